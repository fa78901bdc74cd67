"""What a BatchNorm module, or the layer that replaced one, tells of itself."""

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...layers.torch.norm import RunningNorm
from .subclasses import After, after, nothing_more

_RANKS = {cls._check_input_dim: rank for rank, cls in enumerate((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), 1)}


def channels_of(module: nn.Module) -> int:
    """Return the number of channels a BatchNorm or its replacement normalizes."""
    for name in ("num_features", "num_channels"):
        if isinstance(channels := getattr(module, name, None), int):
            return channels
    return int(module.running_mean.numel())  # type: ignore[operator]


def epsilon_of(module: Any) -> float:
    """Return what a norm adds to its variance: of frozen BatchNorms that do not tell, the 1e-5 in their forward."""
    if isinstance(module, RunningNorm):
        return float(vars(module)["epsilon" if "epsilon" in vars(module) else "eps"])
    return float(getattr(module, "eps", 1e-5))


def rank_of(module: nn.Module, spatial: tuple[int, ...] | None) -> int | None:
    """Return how many dimensions follow the channels, 1 where there is none too; None if the class takes any."""
    if spatial is not None:
        return max(1, len(spatial))
    if not isinstance(module, _BatchNorm):
        return 2 if is_frozen(module) else None
    return _RANKS.get(type(module)._check_input_dim)


def added_by(module: nn.Module) -> After:
    """Return what the module's class does after the normalization."""
    cls: Any = type(module)
    return next((added for owner, _ in overrides(cls) if (added := after(owner))), nothing_more)


def normalized(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """Return what the normalization in a BatchNorm gives at inference, without what its class adds in ``output``."""
    if added_by(module) is nothing_more:
        return output
    mean, var = module.running_mean, module.running_var
    return F.batch_norm(x, mean, var, module.weight, module.bias, mean is None, 0.0, epsilon_of(module))  # type: ignore[arg-type]


def is_frozen(module: nn.Module) -> bool:
    """Tell the frozen BatchNorms that torchvision, detectron2, timm and others write alike."""
    return "FrozenBatchNorm" in type(module).__name__ and "running_mean" in module._buffers


@functools.cache
def overrides(cls: type) -> tuple[tuple[type, str], ...]:
    """Return the classes outside torch that give ``cls`` its forward and its train, each with which of them."""
    owners = ((next(base for base in cls.__mro__ if name in vars(base)), name) for name in ("forward", "train"))
    return tuple((owner, name) for owner, name in owners if not owner.__module__.startswith("torch.nn."))
