"""A Keras model as an ONNX graph, and as a reference to hold that graph against."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from ..errors import InputError, UnsupportedError
from ..layers.keras import SwitchNormalization
from ..patchers.keras import MARK
from ..patchers.keras_walk import named_layers
from .keras_calls import recording, unique, weighted_layers
from .keras_convert import convert
from .keras_forms import StandIns
from .keras_graph import (
    cancel_transposes,
    mark,
    marks,
    merge_outputs,
    name_sites,
    probe,
    take_probe,
    tidy,
    write_gemms,
)
from .traced import Traced

__all__ = ["dtype_problem", "in_double", "input_shapes", "norm_facts", "run", "trace"]

Array = np.ndarray[Any, Any]
Shape = Sequence[int | None]


def trace(model: Any, examples: Sequence[Shape | Array], *, opset: int) -> Traced:
    """Return ``model`` in inference mode as an ONNX graph of operator set ``opset``, nothing folded.

    ``examples`` has for each input its shape in Keras's own layout and without the batch, None for a dimension
    left open, or an array (N, ...) of that shape. `Traced.sites` name values as `run` returns them: what
    convolutions and per-channel norms compute is (N, C, ...) there. Where the graph has such a value channels last
    only, the site is a Transpose that nothing uses, which cleaning takes away.

    Raises `InputError` if the shapes do not fit the model, `UnsupportedError` if the model is not built, runs on
    another backend than TensorFlow or uses an operation that ONNX lacks, and `MissingDependencyError`.
    """
    _require_tensorflow()
    inputs = _Inputs(model, [_shape(example) for example in examples])
    stand_ins = StandIns()
    names: list[str] = []
    sites: list[str] = []

    def inference(*tensors: Any) -> list[Any]:
        with stand_ins.standing_in(model), recording(model) as returned:
            outputs = _named(_call(model, inputs.pack(tensors)), model, taken=inputs.names)
        own = {site: call for site, call in returned.items() if call[1].graph is tensors[0].graph}
        names[:] = outputs
        sites[:] = own
        marked = [mark(tensor, number) for number, (_, tensor) in enumerate(own.values(), len(stand_ins.calls))]
        return [*outputs.values(), probe(marked)]

    converted = convert(inference, inputs.specs, lambda: [*names, unique("probe", names)], opset)
    stand_ins.write(converted, marks(converted.graph))
    write_gemms(converted)
    cancel_transposes(converted.graph)
    merge_outputs(converted.graph)
    values = take_probe(converted.graph)
    numbered = enumerate(sites, len(stand_ins.calls))
    found = {site: values[number] for number, site in numbered if number in values}
    located = name_sites(found, taken=[*inputs.names, *names])
    tidy(converted.graph, keep=located.values())
    return Traced(converted, {site: str(value.name) for site, value in located.items()})


def run(model: Any, arrays: Sequence[Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the outputs and the sites' outputs of ``model`` in inference mode, by name and in call order.

    Sites are laid out as in `trace`: convolutions and per-channel norms channels first.
    """
    inputs = _Inputs(model, [_shape(array) for array in arrays])
    dtypes = [dtype for _, dtype in inputs.specs.values()]
    tensors = [keras.ops.convert_to_tensor(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)]
    with recording(model) as returned:
        outputs = _named(_call(model, inputs.pack(tensors)), model, taken=inputs.names)
    sites = {site: tensor for site, (_, tensor) in returned.items() if not _symbolic(tensor)}
    return _to_numpy(outputs), _to_numpy(sites)


def input_shapes(model: Any) -> list[tuple[int | None, ...]] | None:
    """Return the shape of each input of ``model`` without the batch, or None where the model does not know."""
    inputs = getattr(model, "inputs", None)
    return None if not inputs else [tuple(tensor.shape[1:]) for tensor in inputs]


def dtype_problem(model: Any) -> str | None:
    """Return why ``model``'s number format cannot be exported, or None."""
    for path, layer in named_layers(model):
        for dtype in (layer.compute_dtype, layer.variable_dtype):
            if dtype in {"float64", "float16", "bfloat16"}:
                return f"{dtype} in layer {path!r}: rebuild the model with the dtype policy float32"
    return None


def norm_facts(model: Any) -> dict[str, dict[str, Any]]:
    """Return kind, eps, groups and gates of each replaced layer, by name."""
    facts: dict[str, dict[str, Any]] = {}
    for path, layer in weighted_layers(model).items():
        if (kind := vars(layer).get(MARK)) is not None:
            facts[path] = {"kind": kind, "eps": layer.epsilon}
            if isinstance(layer, keras.layers.GroupNormalization):
                facts[path]["groups"] = layer.groups
            elif isinstance(layer, SwitchNormalization):
                for name, gates in zip(("mean_gates", "var_gates"), layer.gates(), strict=True):
                    values = keras.ops.convert_to_numpy(gates).tolist()
                    facts[path][name] = [round(float(gate), 6) for gate in values]
    return facts


class _Inputs:
    """The inputs of a model: their names, shapes and dtypes, and how the model takes them."""

    def __init__(self, model: Any, shapes: Sequence[Shape]) -> None:
        if not model.built:
            raise UnsupportedError(
                f"expected a model that knows its weights, received {type(model).__name__} {model.name!r} that was "
                "never called; call it once on a batch"
            )
        self._model = model
        self._symbolic = getattr(model, "inputs", None) or None
        if self._symbolic is not None:
            own = [_layer_name(tensor) for tensor in self._symbolic]
            dtypes = [tensor.dtype for tensor in self._symbolic]
            _require_fitting(shapes, dict(zip(own, input_shapes(model) or [], strict=True)))
        else:
            own = self._parameters(len(shapes))
            dtypes = ["float32"] * len(own)
        self.specs: dict[str, tuple[tuple[int | None, ...], str]] = {}
        for name, shape, dtype in zip(own, shapes, dtypes, strict=True):
            self.specs[unique(name, self.specs)] = (tuple(shape), dtype)
        self.names = list(self.specs)

    def pack(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """Return ``tensors`` as the positional arguments of the model's ``call``."""
        if self._symbolic is None:
            return tuple(tensors) if self._one_each else (list(tensors),)
        if isinstance(self._model, keras.Sequential):
            return (tensors[0],)
        return (keras.tree.pack_sequence_as(self._model.input, list(tensors)),)

    def _parameters(self, count: int) -> list[str]:
        signature = inspect.signature(self._model.call)
        parameters = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.kind in {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD}
            and parameter.name not in {"training", "mask"}
        ]
        self._one_each = count == 1 or count <= len(parameters)
        if self._one_each:
            return parameters[:count]
        return [f"{parameters[0]}_{index}" for index in range(count)]


def _require_fitting(shapes: Sequence[Shape], own: Mapping[str, Shape]) -> None:
    def fits(given: Shape, expected: Shape) -> bool:
        return len(given) == len(expected) and all(b is None or a == b for a, b in zip(given, expected, strict=True))

    if len(shapes) != len(own) or not all(map(fits, shapes, own.values())):
        expected = ", ".join(f"{name}={tuple(shape)}" for name, shape in own.items())
        raise InputError(
            f"expected one input shape without the batch for each of {expected}, "
            f"received shapes={[tuple(shape) for shape in shapes]}"
        )


def _require_tensorflow() -> None:
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise UnsupportedError(
            f"expected the tensorflow backend, received backend={backend!r}; save the model as .keras and export "
            "it with KERAS_BACKEND=tensorflow"
        )


def _shape(example: Shape | Array) -> Shape:
    return example.shape[1:] if isinstance(example, np.ndarray) else tuple(example)


def _call(model: Any, arguments: tuple[Any, ...]) -> Any:
    return model(*arguments, training=False)


def _named(result: Any, model: Any, taken: Sequence[str]) -> dict[str, Any]:
    """Return the tensors of ``result`` by name: the keys of a dictionary, or else the output layers."""
    flat = keras.tree.flatten_with_path(result)
    own = getattr(model, "output_names", None) or list(map(_layer_name, getattr(model, "outputs", None) or []))
    if len(own) != len(flat):
        own = ["output"] if len(flat) == 1 else [f"output_{index}" for index in range(len(flat))]
    named: dict[str, Any] = {}
    for (path, tensor), name in zip(flat, own, strict=True):
        if any(isinstance(key, str) for key in path):
            name = "/".join(str(key) for key in path)
        named[unique(name, [*taken, *named])] = tensor
    return named


def _layer_name(tensor: Any) -> str:
    """Return the layer behind a symbolic tensor; unlike the tensor's own name, it survives saving."""
    return str(tensor._keras_history.operation.name)


def in_double(model: Any) -> Any:
    """Return a copy of ``model`` whose layers compute in float64; raises `UnsupportedError` if none can be made."""
    described = f"{type(model).__name__} {model.name!r}"
    if getattr(model, "inputs", None) is None:
        raise UnsupportedError(f"expected a Sequential or Functional model to rebuild in float64, received {described}")

    def retyped(layer: Any) -> Any:
        return type(layer).from_config(_retyped(layer.get_config()))

    try:
        with keras.utils.CustomObjectScope({type(layer).__name__: type(layer) for _, layer in named_layers(model)}):
            copy = keras.models.clone_model(model, clone_function=retyped, recursive=True)
        twins = dict(named_layers(copy))
        for path, layer in named_layers(model):
            store: dict[str, Any] = {}
            layer.save_own_variables(store)
            if store:
                twins[path].load_own_variables(store)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedError(
            f"expected a model that can be rebuilt in float64 from its configuration, received {described}: {reason}"
        ) from error
    return copy


def _retyped(config: Any) -> Any:
    """Return a layer's configuration with every dtype policy made float64, those of wrapped layers too."""
    if isinstance(config, dict):
        return {key: "float64" if key == "dtype" else _retyped(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return type(config)(_retyped(value) for value in config)
    return config


def _symbolic(tensor: Any) -> bool:
    """Whether ``tensor`` belongs to a graph under construction (the body of a loop) and has no value."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return bool(tf.is_symbolic_tensor(tensor))
    if keras.backend.backend() == "jax":
        import jax

        return isinstance(tensor, jax.core.Tracer)
    return False


def _to_numpy(tensors: Mapping[str, Any]) -> dict[str, Array]:
    return {name: keras.ops.convert_to_numpy(tensor) for name, tensor in tensors.items()}
