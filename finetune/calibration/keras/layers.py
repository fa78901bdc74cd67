"""What calibration needs of a Keras model: its layers, what goes through them, and their parameters."""

from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from ....convert.targets import BatchRenorm
from ....frameworks.keras import named_layers, to_numpy
from ....frameworks.names import first_names
from ....layers.keras import SwitchNormalization
from ....patchers.keras.swap import MARK
from ..least_squares import WIDEST, Array

_REPLACEMENTS = (SwitchNormalization, keras.layers.GroupNormalization)


def site_layers(model: keras.Layer) -> dict[str, keras.Layer]:
    """Return the replaced layers with scale and shift by name, those of a loaded model by their type.

    BatchRenormalization computes the original already and is left out.
    """
    return {name: layer for name, layer in first_names(named_layers(model)).items() if _is_site(layer)}


def linear_layers(model: keras.Layer) -> dict[str, keras.Layer]:
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


def channels_last(layer: keras.Layer, x: Any, y: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return a call's input and output with the channels last, in float32 or wider."""
    axis = _channel_axis(layer)
    return np.moveaxis(to_numpy(x), axis, -1), np.moveaxis(to_numpy(y), axis, -1)


def get_affine(layer: keras.Layer) -> tuple[Array, Array]:
    """Return the layer's scale and shift in float64."""
    return np.asarray(layer.gamma.numpy(), np.float64), np.asarray(layer.beta.numpy(), np.float64)


def set_affine(layer: keras.Layer, gamma: Array, beta: Array) -> None:
    """Give the layer this scale and shift."""
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)


def get_weights(layer: keras.Layer) -> Array:
    """Return a linear map's weights (K + 1, O) in float64, its bias or zeros as the last row."""
    kernel = np.asarray(layer.kernel.numpy(), np.float64)
    rows = kernel.reshape(-1, kernel.shape[-1])
    bias = np.zeros(rows.shape[1]) if layer.bias is None else np.asarray(layer.bias.numpy(), np.float64)
    return np.vstack([rows, bias])


def set_weights(layer: keras.Layer, weights: Array) -> None:
    """Give the layer these weights, shaped as `get_weights` returns them; one without a bias ignores the last row."""
    inputs = int(np.prod(layer.kernel.shape[:-1]))
    layer.kernel.assign(weights[:inputs].reshape(layer.kernel.shape))
    if layer.bias is not None:
        layer.bias.assign(weights[inputs])


def patches(layer: keras.Layer, sample: NDArray[Any]) -> NDArray[Any]:
    """Return what each output of the layer is a linear map of, (M, K): one sample's windows, and a 1."""
    if isinstance(layer, keras.layers.Conv2D):
        windows = ops.image.extract_patches(
            sample[None],
            layer.kernel_size,
            strides=layer.strides,
            dilation_rate=layer.dilation_rate,
            padding=layer.padding,
            data_format="channels_last",
        )
        sample = np.asarray(ops.convert_to_numpy(windows))
    rows = sample.reshape(-1, sample.shape[-1])
    return np.hstack([rows, np.ones((len(rows), 1), rows.dtype)])


def _channel_axis(layer: keras.Layer) -> int:
    first = getattr(layer, "data_format", None) == "channels_first"
    return int(getattr(layer, "axis", 1 if first else -1))


def _is_site(layer: keras.Layer) -> bool:
    kind = layer.__dict__.get(MARK)
    replaced = isinstance(layer, _REPLACEMENTS) if kind is None else kind != BatchRenorm.kind
    return replaced and layer.gamma is not None and layer.beta is not None
