"""What calibration needs of a Keras model: its layers, what goes through them, and their parameters."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from ....convert.equalize import Equalized
from ....convert.gates import softmax
from ....convert.state import Array, BatchNormState
from ....convert.targets import BatchRenorm, GroupNorm, SwitchNorm
from ....errors import InputError
from ....frameworks.keras import call, named_layers, to_numpy
from ....frameworks.names import first_names
from ....layers.keras import SwitchNormalization
from ....patchers.keras.equalized import absorbed
from ....patchers.keras.fronts import _weight_name, by_channel, read_front
from ....patchers.keras.swap import FRONT, MARK, BatchNorm, read_state
from ..contract import Solvable
from ..least_squares import WIDEST

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


def front_weights(layer: keras.Layer) -> tuple[Array, Array | None]:
    """Return the weights (C, K) of a layer in front, a row for each output channel, and its bias, in float64."""
    (weight,) = (value for name, value in _weights(layer).items() if name != "bias")
    rows = by_channel(layer, weight)
    return rows.reshape(len(rows), -1), None if layer.bias is None else np.asarray(layer.bias.numpy(), np.float64)


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
    found = [to_numpy(y) for y in keras.tree.flatten(call(model, batch)) if hasattr(y, "dtype")]
    return [y for y in found if np.issubdtype(y.dtype, np.floating)]


def linear_layers(model: keras.Layer) -> Mapping[str, keras.Layer]:
    """Return the Conv2D and Dense layers that can be refitted by name.

    Subclasses, layers with an activation of their own, grouped convolutions, frozen layers, and inputs wider than
    `WIDEST` are left out.
    """
    found = {}
    for name, layer in first_names(named_layers(model)).items():
        if type(layer) not in (keras.layers.Conv2D, keras.layers.Dense) or not layer.trainable or not layer.built:
            continue
        plain = layer.activation is keras.activations.linear and layer.kernel is layer._kernel
        if plain and getattr(layer, "groups", 1) == 1 and np.prod(layer.kernel.shape[:-1]) < WIDEST:
            found[name] = layer
    return found


def picked(layer: keras.Layer, y: Any, count: int) -> NDArray[Any]:
    """Return some outputs (1, M, O) of a linear layer, at ``count`` positions a sample."""
    rows = _channels_last(layer, y)
    rows = rows.reshape(len(rows), -1, rows.shape[-1])
    return rows[:, _positions(rows.shape[1], count)].reshape(1, -1, rows.shape[-1])


def rows(layer: keras.Layer, x: Any, y: Any, count: int) -> NDArray[Any]:
    """Return what the outputs that `picked` returns of y are a linear map of, (1, M, K + 1): windows, and a 1."""
    found = []
    for sample in _channels_last(layer, x):  # one at a time, since windows overlap
        windows = sample
        if isinstance(layer, keras.layers.Conv2D):
            patches = ops.image.extract_patches(
                sample[None],
                layer.kernel_size,
                strides=layer.strides,
                dilation_rate=layer.dilation_rate,
                padding=layer.padding,
                data_format="channels_last",
            )
            windows = np.asarray(ops.convert_to_numpy(patches))
        windows = windows.reshape(-1, windows.shape[-1])
        found.append(windows[_positions(len(windows), count)])
    together = np.concatenate(found)[None]
    return np.concatenate([together, np.ones((*together.shape[:2], 1), together.dtype)], axis=2)


def get_weights(layer: keras.Layer) -> Array:
    """Return a linear map's weights (1, K + 1, O) in float64, its bias or zeros as the last row."""
    kernel = np.asarray(layer.kernel.numpy(), np.float64)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    bias = np.zeros(matrix.shape[1]) if layer.bias is None else np.asarray(layer.bias.numpy(), np.float64)
    return np.vstack([matrix, bias])[None]


def set_weights(layer: keras.Layer, weights: Array) -> None:
    """Give the layer these weights, shaped as `get_weights` returns them; one without a bias ignores the last row."""
    layer.kernel.assign(weights[0, :-1].reshape(layer.kernel.shape))
    if layer.bias is not None:
        layer.bias.assign(weights[0, -1])


def _channels_last(layer: keras.Layer, x: Any) -> NDArray[Any]:
    first = getattr(layer, "data_format", None) == "channels_first"
    return np.moveaxis(to_numpy(x), 1, -1) if first else to_numpy(x)


def _positions(size: int, count: int) -> NDArray[Any]:
    """Return up to ``count`` of ``size`` positions, the same at every call."""
    return np.random.default_rng(size).permutation(size)[:count]


def _is_site(layer: keras.Layer) -> bool:
    kind = layer.__dict__.get(MARK)
    replaced = isinstance(layer, _REPLACEMENTS) if kind is None else kind != BatchRenorm.kind
    return replaced and layer.gamma is not None and layer.beta is not None


def _weights(layer: keras.Layer) -> dict[str, NDArray[Any]]:
    """Return the arrays that a layer in front makes its output channels with, by attribute."""
    found = {name: getattr(layer, name) for name in (_weight_name(layer), "bias")}
    return {name: variable.numpy() for name, variable in found.items() if variable is not None}
