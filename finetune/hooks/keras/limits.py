"""The limits of a Keras model's Batch Renormalizations."""

from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from ....frameworks.keras import distinct_layers
from ....layers.keras import BatchRenormalization


def renorms(model: keras.Layer) -> list[Any]:
    """Return every BRN."""
    return [layer for layer in distinct_layers(model) if isinstance(layer, BatchRenormalization)]


def set_limits(renorms: Iterable[Any], r_max: float, d_max: float) -> None:
    """Set the limits of these BRN."""
    values = ops.convert_to_tensor(r_max, "float32"), ops.convert_to_tensor(d_max, "float32")
    for layer in renorms:
        layer._take_limits((r_max, d_max), values)
