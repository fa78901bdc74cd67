"""The linear layer in front of a replaced norm, with a scale and a shift absorbed, and the way back."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from ...convert.equalize import Equalized
from .fronts import _weight_name, channels_of, scaled
from .strategy import beside

BIASED = "_normswap_bias"
"""Attribute of a layer that has got a bias which its constructor's arguments may not tell of."""


class Absorbed:
    """What one linear layer takes for the norm behind it.

    The kernel stays the variable it is and takes other values. A bias that the layer lacks, where ``mode`` is "full",
    is a new one, made as the layer makes its own.
    """

    def __init__(self, name: str, layer: keras.Layer, mode: str | None) -> None:
        self.name, self.layer = name, layer
        self.adds_bias = mode == "full" and layer.bias is None
        self.bias: Any = None
        self.old = self.values()

    def apply(self, found: Equalized | None) -> None:
        """Absorb what equalizing found; without it only make room for a bias."""
        if self.adds_bias and self.layer.bias is None:
            _add_bias(self.layer, self.bias)
            self.bias = self.layer.bias
        if found is not None:
            for name, value in absorbed(self.layer, self.old, found).items():
                getattr(self.layer, name).assign(value)
        self.written = self.values()

    def trained(self) -> bool:
        """Return whether the layer has changed since."""
        now = self.values()
        return now.keys() != self.written.keys() or not all(np.array_equal(now[k], v) for k, v in self.written.items())

    def restore(self) -> None:
        """Give the layer back what it had."""
        for name, value in self.old.items():
            getattr(self.layer, name).assign(value)
        if self.adds_bias and self.layer.bias is not None:
            self.layer._untrack_variable(self.layer.bias)
            self.layer.bias, self.layer.use_bias = None, False
            self.layer.__dict__.pop(BIASED, None)

    def values(self) -> dict[str, Any]:
        """Return a copy of what the layer has now."""
        found = {name: getattr(self.layer, name) for name in (_weight_name(self.layer), "bias")}
        return {name: variable.numpy() for name, variable in found.items() if variable is not None}


def absorbed(layer: keras.Layer, old: Mapping[str, Any], found: Equalized) -> dict[str, Any]:
    """Return the kernel and, where there is one, the bias of ``layer`` that had ``old`` ones, in float64."""
    name = _weight_name(layer)
    values = {name: scaled(layer, np.asarray(old[name], np.float64), found.factor)}
    if layer.bias is not None:
        values["bias"] = found.absorbed(None if "bias" not in old else np.asarray(old["bias"], np.float64))
    return values


def _add_bias(layer: keras.Layer, variable: Any = None) -> None:
    """Give a layer a bias of zeros where and as it would have made one, or the one that it had before."""
    weight = getattr(layer, _weight_name(layer))
    kind, channels = weight.dtype, channels_of(layer)
    settings = {name: getattr(layer, f"bias_{name}", None) for name in ("regularizer", "constraint")}
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        if variable is not None:
            layer._track_variable(variable)
        else:
            with layer._open_name_scope(), beside([weight]):
                variable = layer.add_weight(name="bias", shape=(channels,), initializer="zeros", dtype=kind, **settings)
        layer.bias, layer.use_bias = variable, True
    finally:
        if locked:
            layer._lock_state()
    layer.__dict__[BIASED] = True
