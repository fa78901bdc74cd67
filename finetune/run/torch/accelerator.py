"""The precision a PyTorch model is trained in."""

from collections.abc import Iterable

import accelerate
import torch
from accelerate.state import AcceleratorState
from torch import nn

from ....errors import MissingDependencyError, UnsupportedError, option
from .processes import CPU


def accelerator_in(precision: str) -> accelerate.Accelerator:
    """Return what computes in ``precision`` on all processes; raises `MissingDependencyError` if the device cannot."""
    AcceleratorState._reset_state()  # else the first training of a process would choose the precision of all
    mixed = None if precision == "no" else precision  # None leaves it to `accelerate launch`
    try:
        return accelerate.Accelerator(mixed_precision=mixed, cpu=CPU)
    except (ValueError, ImportError) as error:
        raise MissingDependencyError(
            f"expected a device that computes in precision={precision}, received: {error}"
        ) from None


def require_wide(parameters: Iterable[nn.Parameter]) -> None:
    """Raise `UnsupportedError` for parameters too coarse for a step's changes to add up in."""
    for dtype in {parameter.dtype for parameter in parameters} - {torch.float32, torch.float64}:
        raise UnsupportedError(
            f"expected parameters to train in torch.float32 or torch.float64, received some in {dtype}, in which most "
            f"steps change nothing; load the model in float32, and let {option('precision', 'bf16')} compute in less"
        )
