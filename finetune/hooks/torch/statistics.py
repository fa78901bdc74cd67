"""The running statistics of a PyTorch model, measured anew."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ....errors import InputError, UnsupportedError
from ....frameworks.torch import call, inference
from ....layers.torch.norm import RunningNorm
from ....layers.torch.passes import exact
from ...calibration.least_squares import Moments


def moving_layers(model: nn.Module) -> list[Any]:
    """Return every SN, BRN and BatchNorm that keeps moving statistics."""
    found = [m for m in model.modules() if isinstance(m, RunningNorm | _BatchNorm)]
    found = [m for m in found if m._buffers.get("running_mean") is not None]
    return [m for m in found if getattr(m, "batch_statistics", "moving") == "moving"]


def update_statistics(model: nn.Module, batches: Iterable[Any]) -> Callable[[], None]:
    """Re-estimate the running statistics of every SN, BRN and BatchNorm; see `normswap.finetune.update_statistics`."""
    layers = moving_layers(model)
    if not layers:
        raise UnsupportedError(
            "expected a model with SN, BRN or BatchNorm layers that keep moving statistics, received one without"
        )
    kept = {m: (m.running_mean.clone(), m.running_var.clone()) for m in layers}
    seen = {m: Moments() for m in layers}

    def see(m: Any, inputs: Any) -> None:
        rows = exact(inputs[0].detach().movedim(1, -1).flatten(0, -2))
        mean, batch = rows.mean(0), Moments()
        for count, *moments in _of_all_processes(m, len(rows), mean, (rows - mean).square().mean(0)):
            if count:
                batch.merge(count, *(part.cpu().numpy() for part in moments))
        if not batch.count:
            return  # a call without samples, as of a detector that proposes none
        seen[m].merge(batch.count, batch.mean, batch.var)
        _set_statistics(m, batch)  # so that it normalizes by this batch

    def undo() -> None:
        for m, (mean, var) in kept.items():
            m.running_mean.copy_(mean)
            m.running_var.copy_(var)

    handles = [m.register_forward_pre_hook(see) for m in layers]
    try:
        with inference(model):
            for batch in batches:
                call(model, batch[0] if isinstance(batch, list | tuple) else batch)
        if any(moments.count == 0 for moments in seen.values()):
            raise InputError("expected batches that reach every layer, received none for some")
    except BaseException:
        undo()
        raise
    finally:
        for handle in handles:
            handle.remove()
    for m, moments in seen.items():
        _set_statistics(m, moments)
    return undo


def _set_statistics(layer: Any, moments: Moments) -> None:
    layer.running_mean.copy_(torch.from_numpy(moments.mean))
    layer.running_var.copy_(torch.from_numpy(moments.var))


def _of_all_processes(layer: Any, count: int, mean: Tensor, var: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Return a batch's count, mean and variance, and those of the other processes it synchronizes with."""
    if (world := _processes(layer)) == 1:
        return [(count, mean, var)]
    own = torch.stack([torch.full_like(mean, count), mean, var])
    parts = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(parts, own, group=layer.process_group)
    return [(int(part[0, 0]), part[1], part[2]) for part in parts]


def _processes(layer: Any) -> int:
    """Return over how many processes the layer takes its batch statistics."""
    if isinstance(layer, RunningNorm):
        return layer._processes()
    if isinstance(layer, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
        return dist.get_world_size(layer.process_group)
    return 1
