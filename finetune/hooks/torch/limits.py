"""The limits of a PyTorch model's Batch Renormalizations."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ....layers.torch.batch_renorm import _BatchRenorm


def renorms(model: nn.Module) -> list[Any]:
    """Return every BRN."""
    return [module for module in model.modules() if isinstance(module, _BatchRenorm)]


def set_limits(renorms: Iterable[Any], r_max: float, d_max: float) -> None:
    """Set the limits of these BRN."""
    for layer in renorms:
        layer.set_limits(r_max, d_max)
