"""Find the linear layer in front of each BatchNorm, by what a call of the model does with its output.

A convolution, transposed, depthwise or separable convolution or dense layer is in front of a BatchNorm if its output
reaches the BatchNorm as it is, or reshaped with its channels kept, and nothing else reads it. The call is traced into a
graph by TensorFlow, which tells of every operation who reads what it returned, in whoever's code it is. On other
backends a model that is a graph of Keras's own layers tells it (`drawn`), where nothing is in between.
"""

import gc
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from ...convert.equalize import Front, by_groups
from ...convert.state import Array
from ...frameworks.example import Inputs
from ...frameworks.keras import call, inference, input_shapes, override, to_numpy
from .behind import COPIES, MOVES, SHAPES, goes_in, moved
from .drawn import foreign, readers

_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
_KINDS = (*_CONVOLUTIONS, *_TRANSPOSED, *_DEPTHWISE, *_SEPARABLE, keras.layers.Dense)

_TRACED = keras.backend.backend() == "tensorflow"
"""Whether the backend makes a graph of whatever code, which tells who reads what."""

_TOLERANCES = {"float16": 2.0**-7, "bfloat16": 2.0**-4, "float64": 2.0**-40}
"""How far from a linear function of its weights a layer may be in this type, as a share of the largest output."""

Method = Callable[..., Any]


class Fronts:
    """What a call shows of the linear layers of a model and of who reads their outputs.

    ``layers`` and ``sites`` are layers by key. `look` calls the model on an example, and `of` tells what is in front of
    a site.
    """

    def __init__(self, layers: Mapping[int, keras.Layer], sites: Mapping[int, keras.Layer]) -> None:
        self.sites = sites
        self.layers = {key: layer for key, layer in layers.items() if isinstance(layer, _KINDS)}
        self.all = list(layers.values())
        owners = Counter(id(v) for layer in self.all for v in _variables(layer))
        self.told = {key: _obstacle(layer, owners) for key, layer in self.layers.items()}
        self.blind = "no example shows what is in front"
        self._forget()

    def _forget(self) -> None:
        self.obstacles = dict(self.told)
        self.calls: Counter[int] = Counter()
        self.graph: Any = None
        self.results: list[Any] = []
        self.given: dict[int, Any] = {}  # what a layer was given, and what it returned
        self.returned: dict[int, Any] = {}
        self.inner: dict[str, int] = {}  # the operations made within a layer's call
        self.fed_by: dict[int, int] = {}
        self.read_by: dict[int, int] = {}
        self.on_the_way: dict[str, int] = {}
        self.goes_in: dict[int, bool | None] = {}

    def look(self, model: keras.Layer, example: Any = None) -> None:
        """Call the model on noise of the example's shape where that is a constant, so that every value counts.

        Without an example the model's own input shapes are one, where it knows them.
        """
        if not self.layers:
            self.blind = ""
            return
        if not _TRACED and (name := foreign(model)):
            backend = f"the {keras.backend.backend()} backend"
            self.blind = f"{backend} shows who reads a layer's output in Keras's own layers alone, not {name}"
            return
        given = _imagined(model) if example is None else Inputs.of(example)
        if given is None:
            return
        for varied in (True, False):
            self._forget()
            try:
                inputs = given.map(_noise) if varied else given
                with inference(model, compiled=False):
                    if _TRACED:
                        self._trace(model, inputs)
                        self._follow()
                    else:
                        self._read(model, inputs)
                    self._run(model, inputs)
                self.blind = ""
                break
            except Exception as error:
                self.blind = f"the model cannot be traced ({_said(error)})"
        else:
            with suppress(Exception), inference(model, compiled=False):
                call(model, given)  # which leaves values where code of the model has kept a graph's tensors
        self.graph = None

    def of(self, key: int, names: Mapping[int, str]) -> dict[str, Any]:
        """Return what a `Site` is to know of the layer in front of it; ``names`` are those of all layers."""
        found = self._front(key, names)
        known = self.goes_in.get(key) if _TRACED and not self.blind else None
        return {"goes_in": True if found.get("front") else known, **found}

    def _front(self, key: int, names: Mapping[int, str]) -> dict[str, Any]:
        if self.blind:
            return {"unequal": self.blind}
        if not self.calls[key] and self.layers:
            return {"unequal": "it did not run on the example"}
        if self.calls[key] > 1:
            return {"unequal": "it runs several times"}
        front = self.fed_by.get(key)
        if front is None:
            return {"unequal": "no linear layer in front"}
        layer, name = self.layers[front], names[front]
        if obstacle := self.obstacles[front]:
            return {"unequal": f"{name}: {obstacle}"}
        return {"front": name, "front_biased": layer.bias is not None, "unequal": ""}

    def _trace(self, model: keras.Layer, inputs: Inputs) -> None:
        """Make a graph of the model's call."""
        import tensorflow as tf

        arrays = [tf.convert_to_tensor(array) for array in inputs.arrays.values()]

        def run(*arrays: Any) -> Any:
            self._forget()
            self.graph = tf.compat.v1.get_default_graph()
            self.results = list(_tensors_in(call(model, inputs.filled(arrays))))
            return self.results

        with self._watching(self._traced, {**self.layers, **self.sites}):
            specs = [tf.TensorSpec(array.shape, array.dtype) for array in arrays]
            tf.function(run, autograph=False).get_concrete_function(*specs)

    def _read(self, model: keras.Layer, inputs: Inputs) -> None:
        """Count the calls of each layer, and read from the model's graph who reads what one returns."""

        def count(key: int, run: Method, args: Any, kwargs: Any) -> Any:
            self.calls[key] += 1
            return run(*args, **kwargs)

        with self._watching(count, {**self.layers, **self.sites}):
            call(model, inputs)
        for layer, output, reading in readers(model):
            key = id(layer)
            if key not in self.layers:
                continue
            self.returned[key] = output
            if self.calls[key] > 1:
                self._refuse(key, "it runs several times")
            if layer.activity_regularizer is not None:
                self._refuse(key, "its output is also read by its activity regularizer")
            for reader in reading:
                if id(reader) in self.sites:
                    self._reached(key, id(reader), ())
                else:
                    also = f"also read by {type(reader).__name__}" if reader is not None else "one of the model's"
                    self._refuse(key, f"its output is {also}")

    def _run(self, model: keras.Layer, inputs: Inputs) -> None:
        """Call the model with values, to try the layers in front and to see what is kept of their outputs."""
        kept: dict[int, Any] = {}
        fronts = {key: self.layers[key] for key in self.read_by}
        with self._watching(partial(self._tried, kept), fronts):
            call(model, inputs)
        if any(reference() is not None for reference in kept.values()):
            gc.collect()
        for key, reference in kept.items():
            if reference() is not None:
                self._refuse(key, "its output is kept by code of the model")

    @contextmanager
    def _watching(
        self, wrap: Callable[[int, Method, Any, Any], Any], layers: Mapping[int, keras.Layer]
    ) -> Iterator[None]:
        def spy(key: int, run: Method) -> Method:
            def watched(*args: Any, **kwargs: Any) -> Any:
                return wrap(key, run, args, kwargs)

            return watched

        with ExitStack() as stack:
            for key, layer in layers.items():
                stack.callback(override(layer, "call", partial(spy, key)))
            yield

    def _traced(self, key: int, run: Method, args: Any, kwargs: Any) -> Any:
        """Take down what a layer is given and returns, and the operations that it makes."""
        import tensorflow as tf

        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        self.calls[key] += 1
        output = run(*args, **kwargs)
        if graph is not self.graph:
            self._refuse(key, "it runs in a loop or a function of its own")
        elif self.calls[key] > 1:
            self._refuse(key, "it runs several times")
        elif not tf.is_tensor(output):
            self._refuse(key, "it does not return a tensor")
        else:
            self.inner |= {operation.name: key for operation in graph.get_operations()[before:]}
            self.given[key], self.returned[key] = args[0] if args else next(iter(kwargs.values()), None), output
        return output

    def _tried(self, kept: dict[int, Any], key: int, run: Method, args: Any, kwargs: Any) -> Any:
        output = run(*args, **kwargs)
        if not self.obstacles[key]:
            self.obstacles[key] = _tried(self.layers[key], run, args, kwargs, output)
        kept[key] = weakref.ref(output)
        return output

    def _follow(self) -> None:
        """Follow what each layer returned to whoever reads it."""
        ends = {tensor.name for tensor in (*self.results, *self.graph.outputs)}
        for key in self.returned.keys() & self.sites.keys():
            inner = {name for name, site in self.inner.items() if site == key}
            self.goes_in[key] = goes_in(self.given[key], self.sites[key].axis, inner, ends)
        for key in self.returned:
            if key in self.layers:
                self._follow_one(key, ends)
        owned = {
            id(handle): key for key in self.read_by for v in _variables(self.layers[key]) for handle in _handles(v)
        }
        for outer, placeholder in self.graph.captures:
            if (owner := owned.get(id(outer))) is not None:
                for reader in placeholder.consumers():
                    if self.inner.get(reader.name) != owner:
                        self._refuse(owner, f"its parameters are read elsewhere, by {reader.type}")
        for layer in self.all:
            for tensor in _tensors_in(dict(vars(layer))):
                kept = self.on_the_way.get(_named(tensor)) if _is_of(tensor, self.graph) else None
                if kept is not None:
                    self._refuse(kept, "its output is kept by code of the model")

    def _follow_one(self, key: int, ends: set[str]) -> None:
        left: list[tuple[Any, tuple[Any, ...]]] = [(self.returned[key], ())]
        while left:
            tensor, way = left.pop()
            self.on_the_way[tensor.name] = key
            if tensor.name in ends:
                self._refuse(key, "its output is one of the model's")
            for reader in tensor.consumers():
                within = self.inner.get(reader.name)
                if within is not None and within in self.sites and _named(self.given[within]) == tensor.name:
                    self._reached(key, within, way)
                elif reader.type in SHAPES:
                    continue
                elif within is None and reader.type in COPIES:
                    places = [place for place, each in enumerate(reader.inputs) if each.name == tensor.name]
                    left += [(reader.outputs[place], way) for place in places]
                elif within is None and reader.type in MOVES and reader.inputs[0].name == tensor.name:
                    left.append((reader.outputs[0], (*way, reader)))
                else:
                    self._refuse(key, f"its output is also read by {reader.type}")

    def _reached(self, key: int, site: int, way: tuple[Any, ...]) -> None:
        if self.read_by.setdefault(key, site) != site:
            self._refuse(key, "several norms read its output")
        self.fed_by[site] = key
        output, norm = self.returned[key], self.sites[site]
        axis, rank = _axis(self.layers[key], output), len(output.shape)
        for operation in way:
            found = moved(operation, axis)
            if found is None:
                self._refuse(key, "its channels are not those of the norm")
                return
            axis, rank = found, len(operation.outputs[0].shape)
        if axis != norm.axis % rank:
            self._refuse(key, "its channels are not those of the norm")

    def _refuse(self, key: int, reason: str) -> None:
        if key in self.obstacles:
            self.obstacles[key] = self.obstacles[key] or reason


def _variables(layer: keras.Layer) -> list[Any]:
    """Return the variables that a layer holds itself."""
    return list({id(v): v for v in (*layer._trainable_variables, *layer._non_trainable_variables)}.values())


def _handles(variable: Any) -> list[Any]:
    """Return what a graph holds of a variable, one for each replica that has it."""
    return [each.handle for each in getattr(variable.value, "values", (variable.value,))]


def _named(tensor: Any) -> str:
    """Return the name of a graph's tensor, "" for anything else."""
    import tensorflow as tf

    return str(tensor.name) if tf.is_symbolic_tensor(tensor) else ""


def _is_of(tensor: Any, graph: Any) -> bool:
    return getattr(tensor, "graph", None) is graph


def _tensors_in(value: Any, depth: int = 4) -> Iterator[Any]:
    """Yield the tensors in what a model returns or keeps, whatever it is kept in."""
    import tensorflow as tf

    if isinstance(value, tf.Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for each in list(value.values()):
            yield from _tensors_in(each, depth - 1)
    elif depth and isinstance(value, list | tuple | set | frozenset):
        for each in list(value):
            yield from _tensors_in(each, depth - 1)
    elif depth and hasattr(value, "__dataclass_fields__"):
        yield from _tensors_in(vars(value), depth - 1)


def _imagined(model: keras.Layer) -> Inputs | None:
    """Return noise that ``model`` takes, None where it does not tell all sizes."""
    known = input_shapes(model) or []
    shapes = [tuple(size for size in shape if size is not None) for shape in known]
    if not known or shapes != known:
        return None
    if not all("float" in keras.backend.standardize_dtype(tensor.dtype) for tensor in model.inputs):
        return None
    return Inputs(*(_normal((2, *shape), seed) for seed, shape in enumerate(shapes)))


def _said(error: Exception) -> str:
    """Return what an error says, without what Keras puts around that."""
    lines = [re.sub(r"\x1b\[\d*m", "", line).strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith("Exception encountered when calling")]
    return said[0].rstrip(".") if said else type(error).__name__


def _noise(value: Any) -> Any:
    """Return standard normal noise in place of floats that are all one value."""
    array = np.asarray(value)
    if array.dtype.kind != "f" or not array.size or array.min() != array.max():
        return value
    return _normal(array.shape).astype(array.dtype)


def _normal(shape: tuple[int, ...], seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _obstacle(layer: keras.Layer, owners: Counter[int]) -> str:
    """Return why a layer's weights cannot take a factor, as far as the layer tells."""
    if not layer.built:
        return "it is not built"
    if getattr(layer, "quantization_mode", None) is not None:
        return "its kernel is quantized"
    if getattr(layer, "lora_enabled", False):
        return "its kernel is computed, by LoRA"
    kernel, bias = layer.__dict__.get(_weight_name(layer)), layer.__dict__.get("bias")
    if not isinstance(kernel, keras.Variable) or (bias is not None and not isinstance(bias, keras.Variable)):
        return "its kernel or bias is computed"
    if "_kernel" in layer.__dict__ and layer.kernel is not kernel:
        return "its kernel or bias is computed"
    if "float" not in keras.backend.standardize_dtype(kernel.dtype):
        return "its kernel is quantized"
    if any(owners[id(v)] > 1 for v in _variables(layer)):
        return "its parameters are those of another layer, too"
    if not layer.trainable or not all(v.trainable for v in (kernel, bias) if v is not None):
        return "it is frozen"
    if layer.activation is not keras.activations.linear:
        return "its activation is in between"
    if kernel.constraint is not None or getattr(layer, "bias_constraint", None) is not None:
        return "a constraint holds its weights"
    return ""


def _weight_name(layer: keras.Layer) -> str:
    """Return the attribute that holds the weights with which a linear layer makes its output channels."""
    if isinstance(layer, _SEPARABLE):
        return "pointwise_kernel"
    return "kernel" if isinstance(layer, (*_TRANSPOSED, *_DEPTHWISE)) else "_kernel"


def _tried(layer: keras.Layer, run: Method, args: Any, kwargs: Any, output: Any) -> str:
    """Return what is wrong with a layer whose output does not follow its weights and bias, channel by channel."""
    weight, bias = layer.__dict__[_weight_name(layer)], layer.__dict__.get("bias")
    axis = _axis(layer, output)
    before = to_numpy(output)
    channels = before.shape[axis]
    if not before.size:
        return "it returned nothing on the example"
    kind = weight.numpy().dtype
    factor = np.resize(np.array([-2.0, 0.5, -1.0, 4.0], kind), channels)
    shift = (np.linspace(-1, 1, channels) * max(float(np.abs(before).max()), 1e-3)).astype(kind)
    new = scaled(layer, weight.numpy(), factor)
    other = shift if bias is None else bias.numpy() * factor + shift
    was = {name: layer.__dict__.get(name) for name in (_weight_name(layer), "bias", "use_bias")}
    try:
        values = (new, other, True)
        for name, value in zip(was, values, strict=True):
            layer.__dict__[name] = value if value is True else ops.convert_to_tensor(value, layer.compute_dtype)
        found = to_numpy(run(*args, **kwargs))
    except Exception as error:
        return f"it fails with other weights ({_said(error)})"
    finally:
        layer.__dict__.update(was)
    shape = [1] * before.ndim
    shape[axis] = channels
    wanted = before * factor.reshape(shape) + shift.reshape(shape)
    tolerance = _TOLERANCES.get(str(layer.compute_dtype), 2.0**-16) * float(np.abs(wanted).max())
    if found.shape != wanted.shape or not np.abs(found - wanted).max() <= tolerance:
        return "its output is no linear function of its weights and bias, as with weights that are standardized"
    return ""


def scaled(layer: keras.Layer, weight: Any, factor: Any) -> Any:
    """Return the weights of a linear layer with each output channel times a factor, (C,)."""
    if isinstance(layer, _TRANSPOSED):
        return weight * factor[:, None]
    return weight * (factor.reshape(weight.shape[-2:]) if isinstance(layer, _DEPTHWISE) else factor)


def groups_of(layer: keras.Layer) -> int:
    """Return in how many groups a linear layer's outputs read other inputs."""
    if isinstance(layer, _DEPTHWISE):
        return int(layer.__dict__[_weight_name(layer)].shape[-2])
    return int(layer.groups) if isinstance(layer, _CONVOLUTIONS) else 1


def by_channel(layer: keras.Layer, weight: Any) -> Array:
    """Return weights of a linear layer as (C, inputs of each, positions of the kernel), in float64."""
    weight = np.asarray(to_numpy(weight), np.float64)
    if isinstance(layer, _TRANSPOSED):
        weight = np.moveaxis(weight, -2, -1)
    if isinstance(layer, _DEPTHWISE):
        weight = weight.reshape(-1, 1, weight.shape[-2] * weight.shape[-1])
    weight = weight.reshape(-1, *weight.shape[-2:])
    found: Array = weight.transpose(2, 1, 0)
    return found


def front_weights(layer: keras.Layer) -> tuple[Array, Array | None]:
    """Return the weights (C, K) of a layer in front, a row for each output channel, and its bias, in float64."""
    weight = by_channel(layer, getattr(layer, _weight_name(layer)))
    bias = None if layer.bias is None else np.asarray(to_numpy(layer.bias), np.float64)
    return weight.reshape(len(weight), -1), bias


def read_front(layer: keras.Layer, state: Mapping[str, Any] | None = None) -> Front:
    """Return what equalizing needs of a linear layer, or of such weights as it might have."""

    def read(name: str) -> Any:
        value = layer.__dict__.get(name) if state is None else state.get(name)
        return None if value is None else np.asarray(to_numpy(value), np.float64)

    weight = read(_weight_name(layer))
    if isinstance(layer, _TRANSPOSED):
        weight = np.moveaxis(weight, -2, -1)
    if isinstance(layer, _DEPTHWISE):
        gain = _spread(weight)
        norms = np.sqrt(np.square(weight).sum(axis=tuple(range(weight.ndim - 2)))).ravel()
        return Front(gain=gain, norms=norms, bias=read("bias"))
    weight = weight.reshape(-1, *weight.shape[-2:])  # positions, inputs, outputs
    norms = np.sqrt(np.square(weight).sum(axis=(0, 1)))
    constant = weight.sum(axis=0).T
    if isinstance(layer, _SEPARABLE):
        constant = constant @ _spread(read("depthwise_kernel"))
    return Front(gain=by_groups(constant, groups_of(layer)), norms=norms, bias=read("bias"))


def _spread(weight: Any) -> Any:
    """Return what a constant in each input adds to each output of a depthwise kernel."""
    constant = weight.reshape(-1, *weight.shape[-2:]).sum(axis=0)
    inputs, multiplier = constant.shape
    gain = np.zeros((inputs, multiplier, inputs))
    gain[np.arange(inputs), :, np.arange(inputs)] = constant
    return gain.reshape(inputs * multiplier, inputs)


def channels_of(layer: keras.Layer) -> int:
    """Return how many output channels a linear layer has, 0 for one of another kind or that is not built."""
    if not isinstance(layer, _KINDS) or not layer.built:
        return 0
    shape = layer.__dict__[_weight_name(layer)].shape
    if isinstance(layer, _DEPTHWISE):
        return int(shape[-2] * shape[-1])
    return int(shape[-2] if isinstance(layer, _TRANSPOSED) else shape[-1])


def _axis(layer: keras.Layer, output: Any) -> int:
    """Return where a linear layer's output has its channels."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else len(output.shape) - 1
