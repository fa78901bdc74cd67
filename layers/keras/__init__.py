"""Switchable Normalization and Batch Renormalization as Keras 3 layers, for any backend."""

from .batch_renorm import BatchRenormalization
from .switch_norm import SwitchNormalization

__all__ = ["BatchRenormalization", "SwitchNormalization"]
