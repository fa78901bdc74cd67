"""Batch statistics of a PyTorch model over all processes."""

from typing import Any

from torch import nn

from ....layers.torch.norm import RunningNorm


def convert_sync(model: nn.Module, *, sync: bool = True, process_group: Any = None) -> nn.Module:
    """Let every SN and BRN take its batch statistics over all processes, or with ``sync=False`` over its own again.

    It does for them what `torch.nn.SyncBatchNorm.convert_sync_batchnorm` does for BatchNorm, in place::

        model = torch.nn.parallel.DistributedDataParallel(convert_sync(model))

    Args:
        model: a PyTorch model.
        sync: whether to.
        process_group: the processes, None for all of them.
    """
    for module in model.modules():
        if isinstance(module, RunningNorm):
            module.sync, module.process_group = sync, process_group
    return model
