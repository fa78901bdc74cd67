"""Switchable Normalization and Batch Renormalization as Keras 3 layers, for any backend."""

from .batch_renorm import BatchRenormalization
from .group_norm import group_normalization
from .switch_norm import SwitchNormalization

__all__ = ["BatchRenormalization", "SwitchNormalization", "group_normalization"]
