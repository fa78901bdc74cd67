"""What any Keras model can be asked; see `contract`."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any

import keras
import numpy as np

from ..errors import InputError, UnsupportedError
from ..layers.keras import BatchRenormalization, SwitchNormalization
from ..layers.keras.statistics import wide
from .contract import ROUNDING, Array, Arrays, Key
from .example import Inputs, is_array
from .names import distinct
from .outputs import tensors_in

Method = Callable[..., Any]
Shape = Sequence[int | None]
Specs = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape with the batch, and dtype, of each input by name."""

_CHAIN = "_normswap_overrides"
"""Attribute of a layer that holds, for each method, what was there before and what has been wrapped around it."""

_PER_CHANNEL = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    BatchRenormalization,
    SwitchNormalization,
)


def named_layers(model: keras.Layer) -> Iterator[tuple[str, keras.Layer]]:
    """Yield ``model`` under its own name and every layer below it, one held twice as often.

    A name below is the "/"-joined path of layer names; siblings of one name are told apart by "#2", "#3".
    """
    yield model.name, model
    yield from _below(model, "")


def distinct_layers(model: keras.Layer) -> list[keras.Layer]:
    """Return ``model`` and every layer below it once."""
    return list({id(layer): layer for _, layer in named_layers(model)}.values())


def call(model: keras.Layer, example: Any) -> Any:
    """Call ``model`` on an example at inference."""
    args, kwargs = _arguments(model, Inputs.of(example))
    return model(*args, **kwargs, training=False)


_LOOKED_AT: ContextVar[frozenset[int]] = ContextVar("looked_at", default=frozenset())
"""The models within `inference`."""


@contextmanager
def inference(model: keras.Layer, *, compiled: bool = True) -> Iterator[None]:
    """Run the body without gradients, then give the model back what its calls have moved: statistics and states.

    A call at inference moves those of a norm that is given ``training=True`` by code, of a stateful recurrent layer and
    of a layer that counts. Random states come back at the end of the outermost context for a model, so that within it
    two calls differ where the model is random. Layers that are called run as written in any case.
    """
    looked_at = _LOOKED_AT.get()
    kept = _moving(model, random=id(model) not in looked_at)
    before = [(variable, np.array(keras.ops.convert_to_numpy(variable))) for variable in kept]
    token = _LOOKED_AT.set(looked_at | {id(model)})
    try:
        with _without_gradients():
            yield
    finally:
        _LOOKED_AT.reset(token)
        for variable, value in before:
            if not np.array_equal(keras.ops.convert_to_numpy(variable), value):
                variable.assign(value)


def is_built(model: keras.Layer) -> bool:
    """Return whether the model has its weights, which one that has seen no input may not."""
    return bool(model.built)


def _moving(model: keras.Layer, *, random: bool) -> list[Any]:
    """Return the variables that a call may move: all but those that are learned, and random states if they count."""
    layers = distinct_layers(model)
    learned = {id(variable) for layer in layers for variable in layer._trainable_variables}
    seeds = {id(variable) for layer in layers for variable in layer.non_trainable_variables}
    seeds -= {id(variable) for layer in layers for variable in layer.weights}
    return [v for v in model.variables if id(v) not in learned and (random or id(v) not in seeds)]


def _without_gradients() -> AbstractContextManager[None]:
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return nullcontext()


@contextmanager
def watching(
    layers: Mapping[Key, keras.Layer], see: Callable[[Key, Any, Any], object], *, first: bool = False
) -> Iterator[None]:
    """Tell ``see(key, input, output)`` of every call of the layers.

    Wrappers that go past ``__call__``, such as `keras.layers.TimeDistributed`, are seen too. What a layer returns is
    its own in any case.
    """

    def spy(key: Key, run: Method) -> Method:
        @wraps(run)
        def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = run(inputs, *args, **kwargs)
            see(key, inputs, outputs)
            return outputs

        return call

    with ExitStack() as stack:
        for key, layer in layers.items():
            stack.callback(override(layer, "call", partial(spy, key)))
        yield


def override(layer: keras.Layer, name: str, wrap: Callable[[Method], Method]) -> Callable[[], None]:
    """Put ``wrap`` of one of the layer's methods in its place, and return what takes it away again.

    Several around one method may go in any order: what is left of them is wrapped anew.
    """
    chains = layer.__dict__.setdefault(_CHAIN, {})
    before, wraps = chains.setdefault(name, (layer.__dict__.get(name), []))
    own = [wrap]  # a list of its own, so that the same function may be there twice
    wraps.append(own)

    def place() -> None:
        layer.__dict__.pop(name, None)
        if before is not None:
            layer.__dict__[name] = before
        for (each,) in wraps:
            layer.__dict__[name] = each(getattr(layer, name))

    def undo() -> None:
        if own not in wraps:
            return
        wraps[:] = [each for each in wraps if each is not own]
        place()
        if not wraps:
            del chains[name]
            if not chains:
                layer.__dict__.pop(_CHAIN, None)

    place()
    return undo


@contextmanager
def overriding(layer: keras.Layer, name: str, method: Method) -> Iterator[None]:
    """Put ``method`` in place of one of the layer's own within the context."""
    undo = override(layer, name, lambda run: method)
    try:
        yield
    finally:
        undo()


def snapshot(model: keras.Layer) -> Callable[[], None]:
    """Return what gives the model back all variables that it has now, random states and counters among them."""
    kept = [(variable, np.array(keras.ops.convert_to_numpy(variable))) for variable in model.variables]

    def restore() -> None:
        for variable, value in kept:
            variable.assign(value)

    return restore


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


def round_weights(model: keras.Layer, seed: int) -> None:
    """Move every weight of a model in float64 as rounding it to float32 may, up or down as ``seed`` has it."""
    generator = np.random.default_rng(seed)
    for variable in model.variables:
        value = np.asarray(keras.ops.convert_to_numpy(variable))
        if value.dtype == np.float64:
            variable.assign(value * (1 + ROUNDING * generator.choice([-1, 1], value.shape)))


def record(model: keras.Layer, example: Inputs) -> tuple[Arrays, Arrays]:
    """Return the outputs and the sites' outputs of ``model`` in inference mode, by name and in call order.

    What convolutions and per-channel norms compute is (N, C, ...). A model of a mixed policy computes in float32, as
    its file does.
    """
    interface = Interface(model, example)
    with inference(model), single_precision(model), recording(model) as returned:
        result = interface.call(interface.tensors())
    outputs = named_outputs(result, model, taken=interface.names)
    sites = {site: tensor for site, tensor in returned.items() if not is_symbolic(tensor)}
    return _to_numpy(outputs), _to_numpy(sites)


def input_names(model: keras.Layer, example: Inputs) -> list[str]:
    """Return the names of the inputs of ``model``: its input layers, or the arguments of its ``call``."""
    symbolic = getattr(model, "inputs", None)
    if symbolic:
        named: list[tuple[Any, ...]] = [(layer_name(tensor),) for tensor in symbolic]
    else:
        names, places = _parameters(model), list(example.arrays)
        if len(example.args) > len(names):  # in one list, if anywhere
            places = [(0, *place) for place in places if names]
        named = [(names[first] if isinstance(first, int) else first, *way) for first, *way in places]
    return distinct(named)


def ordered(model: keras.Layer, example: Inputs) -> Inputs:
    """Return the arguments of an example with those by name in the order of the model's inputs or arguments."""
    if getattr(model, "inputs", None) is None:
        return example.ordered([*_parameters(model), *_parameters(model, by_keyword=True)])
    structure = None if isinstance(model, keras.Sequential) else model.input  # which that may not have
    named = isinstance(structure, Mapping)
    keys = [path[0] for path, _ in keras.tree.flatten_with_path(structure)] if named else []
    names = keys or [layer_name(tensor) for tensor in model.inputs]
    first = example.args[0] if len(example.args) == 1 and not example.kwargs else None
    if isinstance(first, Mapping) and set(first) == set(names):
        return Inputs(**first).ordered(names)
    return example.ordered(names)


def input_shapes(model: Any) -> list[tuple[int | None, ...]] | None:
    """Return the shape of each input of ``model`` without the batch, or None where the model does not know."""
    inputs = getattr(model, "inputs", None)
    return None if not inputs else [tuple(tensor.shape[1:]) for tensor in inputs]


def input_types(model: Any) -> list[str] | None:
    """Return the type of each input of ``model``, or None where the model does not know."""
    inputs = getattr(model, "inputs", None)
    return None if not inputs else [str(tensor.dtype) for tensor in inputs]


def tables(model: keras.Layer) -> dict[str, tuple[keras.Layer, int, Any]]:
    """Return every embedding with its rows, and every encoding of categories, how many there are."""
    found: dict[str, tuple[keras.Layer, int, Any]] = {}
    seen: set[int] = set()
    for path, layer in named_layers(model):
        if id(layer) in seen:
            continue
        if isinstance(layer, keras.layers.Embedding):
            found[path] = layer, int(layer.input_dim), layer.embeddings
        elif isinstance(layer, keras.layers.CategoryEncoding):
            found[path] = layer, int(layer.num_tokens), None
        seen.add(id(layer))
    return found


def zeros(model: keras.Layer, shape: tuple[int, ...]) -> Array:
    """Return two samples of zeros."""
    return np.zeros((2, *shape), np.float32)


def unusable(model: keras.Layer) -> dict[str, str]:
    """Return which weights are not finite, and which running variances are below 0, or none."""
    found: dict[str, str] = {}
    for variable in model.weights:
        if not keras.backend.is_float_dtype(variable.dtype):
            continue
        values = to_numpy(variable)
        if not (finite := np.isfinite(values)).all():
            found[variable.path] = f"{np.count_nonzero(~finite)} of {values.size} not finite"
        elif variable.path.endswith("moving_variance") and not values.size:
            found[variable.path] = "of no channels"
        elif variable.path.endswith("moving_variance") and (values < 0).any():
            found[variable.path] = f"{np.count_nonzero(values < 0)} of {values.size} below 0"
    return found


def to_numpy(value: Any) -> Array:
    """Return a tensor as an array, in float32 where it is narrower."""
    return np.asarray(keras.ops.convert_to_numpy(wide(value)))


def build_shape(layer: keras.Layer) -> Shape | None:
    """Return the shape of the input that ``layer`` was built for, None if it is not built."""
    shape: Shape | None = (layer.get_build_config() or {}).get("input_shape") if layer.built else None
    return shape


def weighted_layers(model: Any) -> dict[str, Any]:
    """Return every layer that owns weights, once, by its path of layer names.

    A recurrent layer stands for its cell: a cell runs inside a loop, where no single value is its output.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    recurrent: tuple[str, ...] = ()
    for path, layer in named_layers(model):
        if id(layer) in seen or path.startswith(recurrent):
            continue
        seen.add(id(layer))
        if isinstance(layer, keras.layers.RNN):
            recurrent += (f"{path}/",)
        if isinstance(layer, keras.layers.RNN) or _owns_weights(layer):
            found[path] = layer
    return found


@contextmanager
def recording(model: Any) -> Iterator[dict[str, Any]]:
    """Collect the first tensor that each call of a weighted layer returns while the context is open.

    The names are the layers' paths, the second call of a layer is ``"name#2"``; the order is that of the calls.
    What convolutions and per-channel norms return is given as (N, C, ...), the layout it has in ONNX.
    """
    returned: dict[str, Any] = {}
    calls: Counter[str] = Counter()
    layers = weighted_layers(model)

    def observe(path: str, inputs: Any, outputs: Any) -> None:
        calls[path] += 1
        name = path if calls[path] == 1 else f"{path}#{calls[path]}"
        tensor = keras.tree.flatten(outputs)[0]
        last = len(tensor.shape) > 2 and _has_channels_last(layers[path], len(tensor.shape))
        returned[name] = keras.ops.moveaxis(tensor, -1, 1) if last else tensor

    with watching(layers, observe):
        yield returned


def _has_channels_last(layer: Any, rank: int) -> bool:
    if isinstance(layer, _PER_CHANNEL):
        return layer.axis in {-1, rank - 1}
    return getattr(layer, "data_format", None) == "channels_last"


def is_symbolic(tensor: Any) -> bool:
    """Whether ``tensor`` belongs to a graph under construction (the body of a loop) and has no value."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return bool(tf.is_symbolic_tensor(tensor))
    if keras.backend.backend() == "jax":
        import jax

        return isinstance(tensor, jax.core.Tracer)
    return False


class Interface:
    """The inputs of a model as an example gives them: their names, shapes and dtypes, and how the model takes them.

    Raises `UnsupportedError` for a model that was never called, `InputError` for an example that does not fit.
    """

    def __init__(self, model: Any, example: Inputs) -> None:
        if not model.built:
            raise UnsupportedError(
                f"expected a model that knows its weights, received {type(model).__name__} {model.name!r} that was "
                "never called; call it once on a batch"
            )
        self._model, self._example = model, example
        shapes = [tuple(array.shape) for array in example.arrays.values()]
        self.names = input_names(model, example)
        own = getattr(model, "inputs", None) or None
        if own is not None:
            own_shapes = dict(zip(self.names, input_shapes(model) or [], strict=True))
            _require_fitting([shape[1:] for shape in shapes], own_shapes)
        dtypes = [_taken(array) for array in example.arrays.values()] if own is None else [t.dtype for t in own]
        self.specs: Specs = {
            name: (shape, dtype) for name, shape, dtype in zip(self.names, shapes, dtypes, strict=True)
        }

    def call(self, tensors: Sequence[Any]) -> Any:
        """Call the model at inference with ``tensors`` where the example has its arrays."""
        return call(self._model, self._example.filled(tensors))

    def tensors(self) -> list[Any]:
        """Return the example's arrays as the model's tensors."""
        arrays = self._example.arrays.values()
        dtypes = [dtype for _, dtype in self.specs.values()]
        return [keras.ops.convert_to_tensor(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)]


def named_outputs(result: Any, model: Any, taken: Sequence[str]) -> dict[str, Any]:
    """Return the tensors of ``result`` by name: the keys and fields they are under, or else the output layers."""
    parts = keras.tree.flatten_with_path(result)
    found = {place: tensor for path, value in parts for place, tensor in tensors_in(value, _read, tuple(path))}
    if not found:
        raise UnsupportedError(f"expected a model that returns tensors, received one that returns {result!r}")
    own = getattr(model, "output_names", None) or list(map(layer_name, getattr(model, "outputs", None) or []))
    if len(own) != len(found):
        own = ["output"] if len(found) == 1 else [f"output_{index}" for index in range(len(found))]
    told = [any(isinstance(key, str) for key in place) for place in found]
    places = [place if keys else (name,) for place, keys, name in zip(found, told, own, strict=True)]
    return dict(zip(distinct(places, taken, joint="/"), found.values(), strict=True))


def _read(value: Any) -> Any:
    """Return a tensor for a number."""
    return keras.ops.convert_to_tensor(value) if isinstance(value, bool | int | float) else value


def layer_name(tensor: Any) -> str:
    """Return the layer behind a symbolic tensor; unlike the tensor's own name, it survives saving."""
    return str(tensor._keras_history.operation.name)


def is_mixed(layer: keras.Layer) -> bool:
    """Whether ``layer`` computes in fewer bits than its variables have."""
    return layer.variable_dtype == "float32" and layer.compute_dtype in {"float16", "bfloat16"}


@contextmanager
def single_precision(model: Any) -> Iterator[None]:
    """Let every layer whose variables are float32 compute in float32 while the context is open."""
    policies = [(layer, layer.dtype_policy) for layer in distinct_layers(model) if is_mixed(layer)]
    try:
        for layer, _ in policies:
            layer.dtype_policy = "float32"
        yield
    finally:
        for layer, policy in policies:
            layer.dtype_policy = policy


def _taken(array: Any) -> str:
    """Return the dtype of an array as a model without inputs of its own takes it: floats in float32."""
    dtype = str(keras.backend.standardize_dtype(array.dtype))
    return "float32" if "float" in dtype else dtype


def _arguments(model: keras.Layer, example: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments as the model takes them: a graph's in its own structure, code's by its signature."""
    args, kwargs = example.args, example.kwargs
    if getattr(model, "inputs", None):
        if kwargs and not args:
            return (kwargs,), {}
        arrays = list(example.arrays.values())
        if len(arrays) == 1 and (isinstance(model, keras.Sequential) or is_array(model.input)):
            return (arrays[0],), {}
        if len(args) == 1 and not is_array(args[0]):
            return args, {}
        return (keras.tree.pack_sequence_as(model.input, arrays),), {}
    names, by_keyword = _parameters(model), _parameters(model, by_keyword=True)
    if kwargs and not args and names and not set(kwargs) <= {*names, *by_keyword}:
        return (kwargs,), {}
    return ((list(args),), kwargs) if len(args) > len(names) else (args, kwargs)


def _parameters(model: keras.Layer, *, by_keyword: bool = False) -> list[str]:
    """Return the names of what the model's ``call`` takes by position, or by keyword alone, beside mode and mask."""
    kinds = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    wanted = {inspect.Parameter.KEYWORD_ONLY} if by_keyword else kinds
    parameters = inspect.signature(model.call).parameters.values()
    return [each.name for each in parameters if each.kind in wanted and each.name not in {"training", "mask"}]


def _below(layer: keras.Layer, prefix: str) -> Iterator[tuple[str, keras.Layer]]:
    met: Counter[str] = Counter()
    for child in layer._layers:
        met[child.name] += 1
        path = f"{prefix}{child.name}" if met[child.name] == 1 else f"{prefix}{child.name}#{met[child.name]}"
        yield path, child
        yield from _below(child, f"{path}/")


def _retyped(config: Any) -> Any:
    """Return a layer's configuration with every dtype policy made float64, those of wrapped layers too."""
    if isinstance(config, dict):
        return {key: "float64" if key == "dtype" else _retyped(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return type(config)(_retyped(value) for value in config)
    return config


def _owns_weights(layer: Any) -> bool:
    inherited = {id(weight) for child in layer._layers for weight in child.weights}
    return any(id(weight) not in inherited for weight in layer.weights)


def opened(model: Any, shapes: Sequence[Shape]) -> list[tuple[int | None, ...]]:
    """Return ``shapes``, without the batch, with None for every size that the model leaves open.

    A model without inputs of its own leaves all spatial ones open.

    Raises `UnsupportedError` if the model leaves none open.
    """
    own = input_shapes(model)
    if own is None:
        last = keras.config.image_data_format() == "channels_last"
        return [
            tuple(size if axis == (len(shape) - 1 if last else 0) else None for axis, size in enumerate(shape))
            for shape in shapes
        ]
    if not any(size is None for shape in own for size in shape):
        inputs = ", ".join(f"{layer_name(tensor)}={shape}" for tensor, shape in zip(model.inputs, own, strict=True))
        raise UnsupportedError(
            f"expected a model that leaves height and width open, received one with inputs of {inputs}; "
            "build it with None for them"
        )
    return own


def _require_fitting(shapes: Sequence[Shape], own: Mapping[str, Shape]) -> None:
    def fits(given: Shape, expected: Shape) -> bool:
        return len(given) == len(expected) and all(b is None or a == b for a, b in zip(given, expected, strict=True))

    if len(shapes) != len(own) or not all(map(fits, shapes, own.values())):
        expected = ", ".join(f"{name}={tuple(shape)}" for name, shape in own.items())
        raise InputError(
            f"expected one input shape without the batch for each of {expected}, "
            f"received shapes={[tuple(shape) for shape in shapes]}"
        )


def _to_numpy(tensors: Mapping[str, Any]) -> dict[str, Array]:
    return {name: keras.ops.convert_to_numpy(tensor) for name, tensor in tensors.items()}
