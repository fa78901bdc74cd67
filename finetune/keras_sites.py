"""What calibration needs of a Keras model: its replaced layers, their outputs, their scale and shift."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from ..convert.targets import BatchRenorm
from ..errors import InputError
from ..layers.keras import SwitchNormalization
from ..layers.keras.statistics import wide
from ..patchers.keras import MARK
from ..patchers.keras_walk import call, named_layers, watching

Array = NDArray[np.float64]

_REPLACEMENTS = (SwitchNormalization, keras.layers.GroupNormalization)


class _PassEnded(BaseException):
    """Raised to leave a forward pass once its last wanted layer has run; Keras rewraps every `Exception`."""


def site_layers(model: keras.Layer) -> dict[str, keras.Layer]:
    """Return the replaced layers with scale and shift by name, those of a loaded model by their type.

    BatchRenormalization computes the original already and is left out.
    """
    found: dict[int, tuple[str, keras.Layer]] = {}
    for name, layer in named_layers(model):
        if _is_site(layer):
            found.setdefault(id(layer), (name, layer))
    return dict(found.values())


def observe(model: keras.Layer, names: Sequence[str], batch: Any, see: Callable[[str, NDArray[Any]], bool]) -> None:
    """Run ``model`` on one batch and tell ``see(name, output)`` of each call of the named layers, channels last.

    ``batch`` is an array, or a list or mapping of arrays. Outputs are float32, or float64 where the layer computes in
    it. If ``see`` returns True, the forward pass ends there.

    Raises `InputError` for a name that no layer of the model has.
    """
    layers = dict(named_layers(model))
    if missing := [name for name in names if name not in layers]:
        raise InputError(
            f"expected a model with the layers {', '.join(names)}, received one without {', '.join(missing)}; "
            "a reference is the model as it was before the patch, with its layers under the same names"
        )

    def note(name: str, inputs: Any, output: Any) -> None:
        values = np.asarray(ops.convert_to_numpy(wide(output)))
        if see(name, np.moveaxis(values, layers[name].axis, -1)):
            raise _PassEnded

    try:
        with watching({name: layers[name] for name in names}, note):
            call(model, batch)
    except _PassEnded:
        pass


def get_affine(layer: keras.Layer) -> tuple[Array, Array]:
    """Return the layer's scale and shift in float64."""
    return np.asarray(layer.gamma.numpy(), np.float64), np.asarray(layer.beta.numpy(), np.float64)


def set_affine(layer: keras.Layer, gamma: Array, beta: Array) -> None:
    """Give the layer this scale and shift."""
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)


def _is_site(layer: keras.Layer) -> bool:
    kind = layer.__dict__.get(MARK)
    replaced = isinstance(layer, _REPLACEMENTS) if kind is None else kind != BatchRenorm.kind
    return replaced and layer.gamma is not None and layer.beta is not None
