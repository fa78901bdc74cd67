"""What calibration needs of a Keras model: its layers, what goes through them, and their parameters."""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src import backend
from numpy.typing import NDArray

from ....convert.equalize import Equalized
from ....convert.gates import softmax
from ....convert.state import Array, BatchNormState
from ....convert.targets import BatchRenorm, GroupNorm, SwitchNorm
from ....errors import InputError
from ....frameworks.keras import call, distinct_layers, inference, named_layers, to_numpy
from ....frameworks.names import first_names
from ....layers.keras import SwitchNormalization
from ....patchers.keras.equalized import absorbed
from ....patchers.keras.fronts import (
    _CONVOLUTIONS,
    _DEPTHWISE,
    _SEPARABLE,
    _TRANSPOSED,
    _obstacle,
    _variables,
    _weight_name,
    channels_of,
    groups_of,
    read_front,
)
from ....patchers.keras.fronts import (
    front_weights as front_weights,  # of the contract
)
from ....patchers.keras.swap import FRONT, MARK, BatchNorm, read_state
from ..contract import Solvable
from ..least_squares import WIDEST

_CONVOLVING = (*_CONVOLUTIONS, *_DEPTHWISE, *_SEPARABLE)
_CONVOLVED = ("strides", "padding", "data_format", "dilation_rate")
_REPLACEMENTS = (SwitchNormalization, keras.layers.GroupNormalization)


def site_layers(model: keras.Layer) -> dict[str, keras.Layer]:
    """Return the replaced layers with scale and shift by name, those of a loaded model by their type.

    BatchRenormalization computes the original already and is left out.
    """
    return {name: layer for name, layer in first_names(named_layers(model)).items() if _is_site(layer)}


def solvable(model: keras.Layer, original: keras.Layer, sites: Mapping[str, keras.Layer]) -> dict[str, Solvable]:
    """Return what is known of each replaced layer; raises `InputError` where the original has no BatchNorm."""
    now, before = dict(named_layers(model)), dict(named_layers(original))
    found = {}
    for name, layer in sites.items():
        old = before[name]
        if not isinstance(old, BatchNorm):
            raise InputError(
                f"expected an original whose {name} is the BatchNorm that was replaced, received {type(old).__name__}"
            )
        gates = None
        target: GroupNorm | SwitchNorm
        if isinstance(layer, keras.layers.GroupNormalization):
            channels = int(layer.gamma.shape[0])
            target = GroupNorm(groups=channels if layer.groups == -1 else int(layer.groups))
        else:
            target = SwitchNorm(batch_statistics=layer.batch_statistics)
            gates = softmax(np.asarray(layer.mean_weight.numpy(), np.float64))
        groups = target.groups if isinstance(target, GroupNorm) else None
        site = Solvable(read_state(old), target, (layer, None, None), groups, gates)  # type: ignore[arg-type]
        if front := layer.__dict__.get(FRONT):
            site.layers = (layer, now[front], before[front])
            site.front, site.front_name = read_front(before[front]), front
            site.mode = "scale" if now[front].bias is None else "full"
        found[name] = site
    return found


def moments(layer: keras.Layer, x: Any, state: BatchNormState) -> tuple[Array, Array]:
    """Return the mean and the mean square of what a BatchNorm normalizes its input to, by sample and channel."""
    rows = np.moveaxis(to_numpy(x), layer.axis, -1)
    rows = rows.reshape(len(rows), -1, rows.shape[-1])
    mean, deviation = (each.astype(rows.dtype) for each in state.running())
    normalized = (rows - mean) / deviation
    return normalized.mean(axis=1, dtype=np.float64), np.square(normalized).mean(axis=1, dtype=np.float64)


def spatial(layer: keras.Layer, x: Any) -> tuple[int, ...]:
    """Return the sizes of a BatchNorm's input but batch and channels."""
    return tuple(int(size) for i, size in enumerate(x.shape) if i not in (0, layer.axis % len(x.shape)))


def write(site: Solvable, found: Equalized) -> None:
    """Give the replaced layer and the one in front these values."""
    layer, front, before = site.layers
    set_affine(layer, found.gamma, found.beta)
    if front is None:
        return
    if getattr(layer, "moving_mean", None) is not None:
        layer.moving_mean.assign(found.mean)
        layer.moving_variance.assign(found.var)
    for name, value in absorbed(front, _weights(before), found).items():
        getattr(front, name).assign(value)


def get_affine(layer: keras.Layer) -> tuple[Array, Array]:
    """Return the layer's scale and shift in float64."""
    return np.asarray(layer.gamma.numpy(), np.float64), np.asarray(layer.beta.numpy(), np.float64)


def set_affine(layer: keras.Layer, gamma: Array, beta: Array) -> None:
    """Give the layer this scale and shift."""
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)


def outputs(model: keras.Layer, batch: Any) -> list[NDArray[Any]]:
    """Return what the model returns at inference, array by array."""
    with inference(model):
        found = [to_numpy(y) for y in keras.tree.flatten(call(model, batch)) if hasattr(y, "dtype")]
    return [y for y in found if np.issubdtype(y.dtype, np.floating)]


def linear_layers(model: keras.Layer) -> Mapping[str, keras.Layer]:
    """Return the convolutions and dense layers that can be refitted by name.

    Depthwise and separable convolutions are among them, these with their pointwise kernel.
    """
    return {name: layer for name, (layer, obstacle) in _linear(model).items() if not obstacle}


def left_layers(model: keras.Layer) -> Mapping[str, str]:
    """Return by name why the other convolutions and dense layers cannot be refitted."""
    return {name: obstacle for name, (_, obstacle) in _linear(model).items() if obstacle}


def _linear(model: keras.Layer) -> dict[str, tuple[keras.Layer, str]]:
    """Return convolutions and dense layers by name, each with what stands in the way of refitting it, or nothing."""
    owners = Counter(id(v) for layer in distinct_layers(model) for v in _variables(layer))
    kinds = (*_CONVOLVING, *_TRANSPOSED, keras.layers.Dense)
    found = {n: layer for n, layer in first_names(named_layers(model)).items() if isinstance(layer, kinds)}
    return {name: (layer, _refused(layer, owners)) for name, layer in found.items()}


def _refused(layer: keras.Layer, owners: Counter[int]) -> str:
    if isinstance(layer, _TRANSPOSED):
        return "it is a transposed convolution"
    if obstacle := _obstacle(layer, owners):
        return obstacle
    inputs = int(np.prod(layer.__dict__[_weight_name(layer)].shape)) // channels_of(layer)
    return "" if inputs < WIDEST else f"each of its outputs has {inputs} inputs, too many"


def picked(layer: keras.Layer, y: Any, count: int) -> NDArray[Any]:
    """Return some outputs (G, M, O/G) of a linear layer: for each of G groups, at ``count`` positions a sample."""
    found, groups = _channels_last(layer, y), groups_of(layer)
    found = found.reshape(len(found), -1, found.shape[-1])
    found = found[:, _positions(found.shape[1], count)]
    return found.reshape(-1, groups, found.shape[-1] // groups).transpose(1, 0, 2)


def rows(layer: keras.Layer, x: Any, y: Any, count: int) -> NDArray[Any] | None:
    """Return what the outputs that `picked` returns of y are a linear map of, (G, M, K + 1): windows, and a 1.

    A convolution's are of what its class gives the convolution itself, however it pads; None if its class gives that
    other weights than the layer's, or makes something else of what it returns.
    """
    if isinstance(layer, _CONVOLVING):
        windows = _windows(layer, x, _channels_last(layer, y).shape[1:-1], count)
        if windows is None:
            return None
    else:
        flat = to_numpy(x).reshape(len(x), -1, x.shape[-1])
        windows = flat[:, _positions(flat.shape[1], count)].reshape(1, -1, flat.shape[-1])
    return np.concatenate([windows, np.ones((*windows.shape[:2], 1), windows.dtype)], axis=2)


def get_weights(layer: keras.Layer) -> Array:
    """Return a linear map's weights (G, K + 1, O/G) in float64, its bias or zeros as the last row."""
    weight, bias = front_weights(layer)
    both = np.concatenate([weight, (np.zeros(len(weight)) if bias is None else bias)[:, None]], axis=1)
    return both.reshape(groups_of(layer), -1, both.shape[1]).transpose(0, 2, 1)


def set_weights(layer: keras.Layer, weights: Array) -> None:
    """Give the layer these weights, shaped as `get_weights` returns them; one without a bias ignores the last row."""
    both = weights.transpose(0, 2, 1).reshape(-1, weights.shape[1])
    kernel = getattr(layer, _weight_name(layer))
    positions = int(np.prod(kernel.shape[:-2]))
    kernel.assign(both[:, :-1].reshape(len(both), -1, positions).transpose(2, 1, 0).reshape(kernel.shape))
    if layer.bias is not None:
        layer.bias.assign(both[:, -1])


def _channels_last(layer: keras.Layer, x: Any) -> NDArray[Any]:
    first = getattr(layer, "data_format", None) == "channels_first"
    return np.moveaxis(to_numpy(x), 1, -1) if first else to_numpy(x)


def _positions(size: int, count: int) -> NDArray[Any]:
    """Return up to ``count`` of ``size`` positions, the same at every call."""
    return np.random.default_rng(size).permutation(size)[:count]


def _windows(layer: keras.Layer, x: Any, sizes: Sequence[int], count: int) -> NDArray[Any] | None:
    """Return the windows (G, M, K) that a convolution sees for some of its outputs, which has these ``sizes``."""
    seen = _convolved(layer, x)
    if seen is None:
        return None
    given, padding, *settings = seen
    kernel, strides, dilation = (_each(value, len(sizes)) for value in settings)
    wide = [apart * (size - 1) + 1 for size, apart in zip(kernel, dilation, strict=True)]
    if padding == "same":
        ends = [(size - 1) * step + width for size, step, width in zip(sizes, strides, wide, strict=True)]
        lacking = [max(end - size, 0) for end, size in zip(ends, given.shape[1:], strict=False)]
        given = np.pad(given, [(0, 0), *((each // 2, each - each // 2) for each in lacking), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(given, wide, axis=tuple(range(1, 1 + len(sizes))))
    every, apart = ([slice(None, None, step) for step in steps] for steps in (strides, dilation))
    windows = windows[(slice(None), *every, slice(None), *apart)]  # (N, *sizes, C, *kernel)
    if windows.shape[1 : 1 + len(sizes)] != tuple(sizes):
        return None
    chosen = _positions(int(np.prod(sizes)), count)
    where: Any = (slice(None), *np.unravel_index(chosen, sizes))
    found: NDArray[Any] = windows[where]  # (N, M, C, *kernel)
    return found.reshape(len(found) * len(chosen), groups_of(layer), -1).transpose(1, 0, 2)


def _convolved(layer: keras.Layer, x: Any) -> tuple[Any, ...] | None:
    """Return what a layer's class gives its convolution: the inputs, channels last; padding, kernel, strides, dilation.

    A separable layer's is the pointwise one. None if its class gives it other weights than the layer's.
    """
    weight = layer.__dict__[_weight_name(layer)]
    seen: list[dict[str, Any]] = []

    def watched(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(run).bind(*args, **kwargs)
            bound.apply_defaults()
            if any(each is weight for each in bound.arguments.values()):
                seen.append(bound.arguments)
            return run(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in ("conv", "depthwise_conv", "separable_conv"):  # what a class's own code comes to as well
            run = getattr(backend.nn, name)
            stack.callback(setattr, backend.nn, name, run)
            setattr(backend.nn, name, watched(run))
        with suppress(TypeError):  # of a class that takes more than its input
            type(layer).call(layer, ops.convert_to_tensor(x))
    if not seen:
        return None
    called = seen[0]  # of a separable one there may be more within
    inputs, settings = called["inputs"], {name: called[name] for name in _CONVOLVED}
    kernel: Any = tuple(weight.shape[:-2])
    if isinstance(layer, _SEPARABLE):
        inputs = ops.depthwise_conv(inputs, called["depthwise_kernel"], **settings)
        kernel, settings = 1, settings | {"padding": "valid", "strides": 1, "dilation_rate": 1}
    inputs = to_numpy(inputs)
    if settings["data_format"] == "channels_first":
        inputs = np.moveaxis(inputs, 1, -1)
    return inputs, settings["padding"], kernel, settings["strides"], settings["dilation_rate"]


def _each(value: Any, count: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * count


def _is_site(layer: keras.Layer) -> bool:
    kind = layer.__dict__.get(MARK)
    replaced = isinstance(layer, _REPLACEMENTS) if kind is None else kind != BatchRenorm.kind
    return replaced and layer.gamma is not None and layer.beta is not None


def _weights(layer: keras.Layer) -> dict[str, NDArray[Any]]:
    """Return the arrays that a layer in front makes its output channels with, by attribute."""
    found = {name: getattr(layer, name) for name in (_weight_name(layer), "bias")}
    return {name: variable.numpy() for name, variable in found.items() if variable is not None}
