"""What the figures of a fine-tuning are made of in a PyTorch model."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from ....layers.torch import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, SwitchNorm1d, SwitchNorm2d, SwitchNorm3d
from ..contract import Gates, RenormStatistics
from ..training import Array

_RENORMS = (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)
_SWITCHES = (SwitchNorm1d, SwitchNorm2d, SwitchNorm3d)


def gates(model: nn.Module) -> Gates:
    """Return the gates of every Switchable Normalization by name; see `normswap.finetune.run.figures.gates`."""
    found: Gates = {}
    for name, module in model.named_modules():
        if isinstance(module, _SWITCHES):
            mean, var = (each.detach().cpu().numpy() for each in module.gates())
            found[name] = mean, var
    return found


def renorm_statistics(model: nn.Module) -> Callable[[], RenormStatistics | None]:
    """Return what reads the statistics of all Batch Renormalizations at once, None if there are none."""
    layers = [module for module in model.modules() if isinstance(module, _RENORMS)]
    if not layers:
        return lambda: None
    number = np.repeat(np.arange(len(layers)), [m.num_features for m in layers])
    eps = np.array([m.eps for m in layers])[number]

    def read() -> RenormStatistics:
        mean, var = (_numpy(torch.cat(parts)) for parts in _each(layers, "running_mean", "running_var"))
        limits = _each(layers, "r_max", "d_max", "num_batches_tracked")
        r_max, d_max, batches = (_numpy(torch.stack(parts)) for parts in limits)
        weight = [1 / max(n, 1) if m.momentum is None else m.momentum for m, n in zip(layers, batches, strict=True)]
        return RenormStatistics(
            mean, np.sqrt(var + eps), r_max[number], d_max[number], np.array(weight)[number], number
        )

    return read


def _each(layers: Sequence[nn.Module], *names: str) -> list[list[torch.Tensor]]:
    return [[getattr(layer, name) for layer in layers] for name in names]


def _numpy(tensor: torch.Tensor) -> Array:
    return tensor.detach().cpu().to(torch.float64, copy=True).numpy()
