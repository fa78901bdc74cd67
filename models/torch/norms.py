"""The norm of a network for maps (N, C, H, W), by name."""

from collections.abc import Callable
from functools import partial

from torch import nn

from ...layers.torch import BatchRenorm2d, SwitchNorm2d
from ..norms import Norm, groups_of, require_known


def norm_layers(norm: Norm, epsilon: float, groups: int = 32) -> Callable[[int], nn.Module]:
    """Return the function that makes a layer for a number of channels, each with ``epsilon`` unless ``norm`` is one.

    Raises `ValueError` for a name that is none of those it knows.
    """
    if callable(norm):
        return norm
    require_known(norm)
    if norm in ("gn", "ln", "in"):
        return lambda channels: nn.GroupNorm(groups_of(norm, channels, groups), channels, epsilon)
    layer = {"bn": nn.BatchNorm2d, "sn": SwitchNorm2d, "brn": BatchRenorm2d}[norm]
    return partial(layer, eps=epsilon)
