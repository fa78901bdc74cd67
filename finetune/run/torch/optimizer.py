"""The rule by which a PyTorch model learns."""

import torch
from torch import nn

from ....errors import UnsupportedError
from ...hooks.torch.param_groups import param_groups
from ..training import MOMENTUM, Training
from .accelerator import require_wide


def sgd(model: nn.Module, training: Training) -> torch.optim.SGD:
    """Return the optimizer of a training, of all that can learn in ``model``.

    Raises `UnsupportedError` if nothing can, or what can is in half precision.
    """
    groups = param_groups(model, training.weight_decay, gate_lr=training.lr * training.gate_lr)
    if not groups:
        raise UnsupportedError(
            f"expected a model with parameters to train, received none with train={training.train!r}"
        )
    require_wide([parameter for group in groups for parameter in group["params"]])
    return torch.optim.SGD(groups, lr=training.lr, momentum=MOMENTUM)
