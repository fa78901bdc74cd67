"""What a training loop of one's own needs at once: parameter groups, synchronized statistics, their re-estimation."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ....errors import InputError, UnsupportedError
from ....frameworks.torch import call, inference
from ....layers.torch.norm import RunningNorm
from ....layers.torch.passes import exact
from ...calibration.least_squares import Moments

_NORMS = (RunningNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_GATES = ("mean_weight", "var_weight")


def param_groups(model: nn.Module, weight_decay: float, *, gate_lr: float | None = None) -> list[dict[str, Any]]:
    """Return optimizer parameter groups: decay on weights alone, none on norms, biases and gates.

    Decay pulls gates to equal shares, and γ to a closed channel. ``gate_lr`` gives the gates a rate of their own.
    Parameters that do not require gradients are left out.
    """
    gates = [p for m in model.modules() for name in _GATES if isinstance(p := getattr(m, name, None), nn.Parameter)]
    norms = norm_parameters(model)
    known = {id(p) for p in gates}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in known:
            spared = id(parameter) in norms or parameter.dim() <= 1
            (plain if spared else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": [p for p in gates if p.requires_grad], "weight_decay": 0.0},
    ]
    if gate_lr is not None:
        groups[-1]["lr"] = gate_lr
    return [group for group in groups if group["params"]]


def norm_parameters(model: nn.Module) -> set[int]:
    """Return the ids of all normalization layers' own parameters."""
    return {id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}


def convert_sync(model: nn.Module, *, sync: bool = True, process_group: Any = None) -> nn.Module:
    """Let every SN and BRN take its batch statistics over all processes, or with ``sync=False`` over its own again."""
    for module in model.modules():
        if isinstance(module, RunningNorm):
            module.sync, module.process_group = sync, process_group
    return model


def moving_layers(model: nn.Module) -> list[Any]:
    """Return every SN and BRN that keeps moving statistics."""
    layers = [m for m in model.modules() if isinstance(m, RunningNorm) and "running_mean" in m._buffers]
    return [m for m in layers if getattr(m, "batch_statistics", "moving") == "moving"]


def update_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Re-estimate the running statistics of every SN and BRN on ``batches``, in place of their moving averages.

    Mean and variance become those of all the values a layer saw, each batch weighted by its count, while the layers
    normalize by the batch, without BRN's correction towards what is to be replaced; all else runs as at inference.
    ``batches`` are inputs as the model takes them, on any device, or pairs whose first part is. It does for these
    layers what `torch.optim.swa_utils.update_bn` does for BatchNorm. Layers that synchronize count the batches of all
    their processes, which have to have as many each.

    Raises `UnsupportedError` if the model has no such layer, `InputError` if there are no batches.
    """
    layers = moving_layers(model)
    if not layers:
        raise UnsupportedError(
            "expected a model with SN or BRN layers that keep moving statistics, received one without"
        )
    kept = {m: (m.running_mean.clone(), m.running_var.clone()) for m in layers}
    seen = {m: Moments() for m in layers}

    def see(m: Any, inputs: Any) -> None:
        rows = exact(inputs[0].detach().movedim(1, -1).flatten(0, -2))
        mean, batch = rows.mean(0), Moments()
        for count, *moments in _of_all_processes(m, len(rows), mean, (rows - mean).square().mean(0)):
            batch.merge(count, *(part.cpu().numpy() for part in moments))
        seen[m].merge(batch.count, batch.mean, batch.var)
        _set_statistics(m, batch)  # so that it normalizes by this batch

    handles = [m.register_forward_pre_hook(see) for m in layers]
    try:
        with inference(model):
            for batch in batches:
                call(model, batch[0] if isinstance(batch, list | tuple) else batch)
        if any(moments.count == 0 for moments in seen.values()):
            raise InputError("expected batches that reach every layer, received none for some")
    except BaseException:
        for m, (mean, var) in kept.items():
            m.running_mean.copy_(mean)
            m.running_var.copy_(var)
        raise
    finally:
        for handle in handles:
            handle.remove()
    for m, moments in seen.items():
        _set_statistics(m, moments)


def _set_statistics(layer: RunningNorm, moments: Moments) -> None:
    layer.running_mean.copy_(torch.from_numpy(moments.mean))
    layer.running_var.copy_(torch.from_numpy(moments.var))


def _of_all_processes(layer: RunningNorm, count: int, mean: Tensor, var: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Return a batch's count, mean and variance, and with ``sync`` those of the other processes' batches too."""
    if (world := layer._processes()) == 1:
        return [(count, mean, var)]
    own = torch.stack([torch.full_like(mean, count), mean, var])
    parts = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(parts, own, group=layer.process_group)
    return [(int(part[0, 0]), part[1], part[2]) for part in parts]
