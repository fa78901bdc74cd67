"""Switchable Normalization and Batch Renormalization as PyTorch modules."""

from .batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from .switch_norm import SwitchNorm1d, SwitchNorm2d, SwitchNorm3d

__all__ = [
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "SwitchNorm1d",
    "SwitchNorm2d",
    "SwitchNorm3d",
]
