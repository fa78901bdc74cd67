"""The processes that train a PyTorch model together."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed import broadcast

from ....layers.torch.norm import RunningNorm

CPU = not torch.accelerator.is_available()
"""Whether processes are to meet on CPUs, which Accelerate does not see for itself."""


def place(model: nn.Module) -> None:
    """Put ``model`` on the device where it will be trained."""
    model.to(_state().device)


def processes() -> tuple[int, int]:
    """Return this process's rank and how many train together."""
    state = _state()
    return state.process_index, state.num_processes


def gathered(value: Any) -> list[Any]:
    """Return the value of every process, in the order of their ranks."""
    return gather_object([value]) if processes()[1] > 1 else [value]


def agree(model: nn.Module) -> None:
    """Give the model of every process the buffers of rank 0's, as DistributedDataParallel does before each forward."""
    if processes()[1] > 1:
        for buffer in model.buffers():
            broadcast(buffer, 0)


@contextmanager
def synchronized(model: nn.Module) -> Iterator[None]:
    """Take the batch statistics of SN and BRN over all processes for a while.

    Those that take them over some already, as what a SyncBatchNorm becomes does, are left to their processes.
    """
    alone = [module for module in model.modules() if isinstance(module, RunningNorm) and not module.sync]
    kept = [(module, module.process_group) for module in alone] if processes()[1] > 1 else []
    for module, _ in kept:
        module.sync, module.process_group = True, None
    try:
        yield
    finally:
        for module, group in kept:
            module.sync, module.process_group = False, group


def _state() -> accelerate.PartialState:
    return accelerate.PartialState(cpu=CPU)
