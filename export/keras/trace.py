"""A Keras model as an ONNX graph, and as a reference to hold that graph against."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import keras
import numpy as np

from ...convert.carry_over import CLOSED_GATE
from ...errors import UnsupportedError
from ...frameworks.keras import distinct_layers, named_layers
from ...layers.keras import SwitchNormalization
from ...patchers.keras.swap import MARK
from ..norms import STATISTICS
from ..traced import Traced
from .calls import is_symbolic, recording, unique, weighted_layers
from .graph import add_biases, mark, marks, merge_outputs, name_sites, probe, take_probe, tidy, write_gemms
from .interface import Inputs, Shape, input_shapes, named_outputs, opened
from .layout import sink_transposes
from .norms import StandIns

__all__ = [
    "dtype_problem",
    "in_double",
    "input_names",
    "input_shapes",
    "norm_facts",
    "notes",
    "prune",
    "run",
    "trace",
]

Array = np.ndarray[Any, Any]

_CONVERTERS = {"tensorflow": ".tf2onnx", "torch": ".on_torch"}


def trace(model: Any, examples: Sequence[Shape | Array], *, opset: int, dynamic: bool = False) -> Traced:
    """Return ``model`` in inference mode as an ONNX graph of operator set ``opset``, nothing folded.

    ``examples`` has for each input its shape in Keras's own layout and without the batch, None for a dimension
    left open, or an array (N, ...) of that shape; with ``dynamic`` every size that the model leaves open is open.
    `Traced.sites` name values as `run` returns them: what convolutions and per-channel norms compute is (N, C, ...)
    there. Where the graph has such a value channels last only, the site is a Transpose that nothing uses, which
    cleaning takes away.

    Raises `InputError` if the shapes do not fit the model, `UnsupportedError` if the model is not built, runs on
    JAX, has no open size for ``dynamic`` or uses an operation that ONNX lacks, and `MissingDependencyError`.
    """
    converter = _converter()
    shapes = [_shape(example) for example in examples]
    inputs = Inputs(model, opened(model, shapes) if dynamic else shapes)
    arrays = [example for example in examples if isinstance(example, np.ndarray)]
    stand_ins = StandIns(model, mark)
    names: list[str] = []
    sites: list[str] = []

    def inference(*tensors: Any) -> list[Any]:
        def within(tensor: Any) -> bool:  # not within the body of a loop, which TensorFlow makes a graph of its own
            return getattr(tensor, "graph", None) is getattr(tensors[0], "graph", None)

        with stand_ins.standing_in(within), recording(model) as returned:
            outputs = named_outputs(_call(model, inputs.pack(tensors)), model, taken=inputs.names)
        own = {site: tensor for site, tensor in returned.items() if within(tensor)}
        names[:] = outputs
        sites[:] = own
        marked = [mark(tensor, number) for number, tensor in enumerate(own.values(), len(stand_ins.calls))]
        return [*outputs.values(), probe(marked)]

    with _single_precision(model):
        if len(arrays) == len(inputs.names):
            stand_ins.look(lambda: _call(model, inputs.pack(_tensors(inputs, arrays))))
        converted = converter.convert(inference, model, inputs.specs, lambda: [*names, unique("probe", names)], opset)
    found = marks(converted.graph)
    norms = {found[number]: norm for number, norm in enumerate(stand_ins.calls) if number in found}
    write_gemms(converted)
    sink_transposes(converted.graph, fixed=found.values())
    add_biases(converted.graph)
    merge_outputs(converted.graph)
    values = take_probe(converted.graph)
    numbered = enumerate(sites, len(stand_ins.calls))
    located = {site: values[number] for number, site in numbered if number in values}
    located = name_sites(located, taken=[*inputs.names, *names])
    tidy(converted.graph, keep=located.values())
    return Traced(converted, {site: str(value.name) for site, value in located.items()}, norms)


def run(model: Any, arrays: Sequence[Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the outputs and the sites' outputs of ``model`` in inference mode, by name and in call order.

    Sites are laid out as in `trace`: convolutions and per-channel norms channels first. A model of a mixed policy
    computes in float32, as its file does.
    """
    inputs = Inputs(model, [_shape(array) for array in arrays])
    with _single_precision(model), recording(model) as returned:
        result = _call(model, inputs.pack(_tensors(inputs, arrays)))
    outputs = named_outputs(result, model, taken=inputs.names)
    sites = {site: tensor for site, tensor in returned.items() if not is_symbolic(tensor)}
    return _to_numpy(outputs), _to_numpy(sites)


def input_names(model: Any, count: int) -> list[str]:
    """Return the names of the ``count`` inputs of ``model``."""
    return Inputs(model, input_shapes(model) or [()] * count).names


def dtype_problem(model: Any) -> str | None:
    """Return why ``model``'s number format cannot be exported, or None; a mixed policy's weights are float32."""
    for path, layer in named_layers(model):
        for dtype in (layer.variable_dtype, layer.compute_dtype):
            if dtype in {"float64", "float16", "bfloat16"} and not _is_mixed(layer):
                return f"{dtype} in layer {path!r}: rebuild the model with the dtype policy float32"
    return None


def notes(model: Any) -> list[str]:
    """Return what is to be known of a file made from ``model``."""
    policies = sorted({layer.dtype_policy.name for layer in distinct_layers(model) if _is_mixed(layer)})
    return [f"the model's dtype policy is {name}: the file computes in float32" for name in policies]


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


@contextmanager
def prune(model: Any, threshold: float) -> Iterator[dict[str, list[str]]]:
    """Close every gate below ``threshold`` of the Switchable Normalizations while the context is open.

    The context is a dictionary of the gates closed, by layer. The others keep their shares of each other.
    """
    before: list[tuple[Any, Array]] = []
    dropped: dict[str, list[str]] = {}
    try:
        for path, layer in weighted_layers(model).items():
            if isinstance(layer, SwitchNormalization):
                logits = layer.mean_weight, layer.var_weight
                for kind, variable, gates in zip(("mean", "variance"), logits, layer.gates(), strict=True):
                    weight, values = (keras.ops.convert_to_numpy(tensor) for tensor in (variable, gates))
                    below = (values < threshold) & (values > 0)
                    if below.any():
                        before.append((variable, np.array(weight)))
                        closed = weight.max() + CLOSED_GATE * keras.ops.convert_to_numpy(layer.temperature)
                        variable.assign(np.where(below, closed, weight))
                        shut = (STATISTICS[index] for index in np.flatnonzero(below))
                        dropped.setdefault(path, []).extend(f"{kind} {statistic}" for statistic in shut)
        yield dropped
    finally:
        for variable, weight in before:
            variable.assign(weight)


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


def _converter() -> ModuleType:
    backend = keras.backend.backend()
    if backend not in _CONVERTERS:
        raise UnsupportedError(
            f"expected the tensorflow or the torch backend, received backend={backend!r}; save the model as .keras "
            "and export it with KERAS_BACKEND=tensorflow"
        )
    return import_module(_CONVERTERS[backend], __package__)


def _shape(example: Shape | Array) -> Shape:
    return example.shape[1:] if isinstance(example, np.ndarray) else tuple(example)


def _call(model: Any, arguments: tuple[Any, ...]) -> Any:
    return model(*arguments, training=False)


def _tensors(inputs: Inputs, arrays: Sequence[Array]) -> list[Any]:
    dtypes = [dtype for _, dtype in inputs.specs.values()]
    return [keras.ops.convert_to_tensor(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)]


def _is_mixed(layer: Any) -> bool:
    """Whether ``layer`` computes in fewer bits than its variables have."""
    return layer.variable_dtype == "float32" and layer.compute_dtype in {"float16", "bfloat16"}


@contextmanager
def _single_precision(model: Any) -> Iterator[None]:
    """Let every layer whose variables are float32 compute in float32 while the context is open."""
    policies = [(layer, layer.dtype_policy) for layer in distinct_layers(model) if _is_mixed(layer)]
    try:
        for layer, _ in policies:
            layer.dtype_policy = "float32"
        yield
    finally:
        for layer, policy in policies:
            layer.dtype_policy = policy


def _to_numpy(tensors: Mapping[str, Any]) -> dict[str, Array]:
    return {name: keras.ops.convert_to_numpy(tensor) for name, tensor in tensors.items()}
