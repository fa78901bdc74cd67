"""The norm of a network for maps (N, H, W, C), by name."""

from collections.abc import Callable

import keras

from ...layers.keras import BatchRenormalization, SwitchNormalization
from ..norms import Norm, groups_of, require_known


def norm_layers(norm: Norm, epsilon: float, groups: int = 32) -> Callable[[int], keras.Layer]:
    """Return the function that makes a layer for a number of channels, each with ``epsilon`` unless ``norm`` is one.

    Raises `ValueError` for a name that is none of those it knows.
    """
    if callable(norm):
        return norm
    require_known(norm)
    if norm in ("gn", "ln", "in"):
        return lambda channels: keras.layers.GroupNormalization(groups_of(norm, channels, groups), epsilon=epsilon)
    layer = {"bn": keras.layers.BatchNormalization, "sn": SwitchNormalization, "brn": BatchRenormalization}[norm]
    return lambda channels: layer(epsilon=epsilon)
