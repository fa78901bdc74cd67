"""The momentum of a PyTorch model's moving statistics."""

from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ....layers.torch.batch_renorm import _BatchRenorm
from ....layers.torch.norm import RunningNorm


def scale_momentum(model: nn.Module, share: float, renorm: float) -> Callable[[], None]:
    """Let a batch weigh as the ``share`` of one in all moving statistics, and return what undoes it.

    In those of BRN one weighs ``renorm`` at most.
    """
    found = [module for module in model.modules() if isinstance(module, RunningNorm | _BatchNorm)]
    kept = [(module, module.momentum) for module in found if module.momentum is not None]
    for module, momentum in kept:
        if isinstance(module, _BatchRenorm):
            momentum = min(momentum, renorm)
        of_the_old = getattr(module, "compat", None) is not None
        module.momentum = momentum**share if of_the_old else 1 - (1 - momentum) ** share

    def undo() -> None:
        for module, momentum in kept:
            module.momentum = momentum

    return undo
