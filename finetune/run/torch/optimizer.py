"""The rule by which a PyTorch model learns."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ....errors import UnsupportedError
from ...hooks.torch.param_groups import param_groups
from ..training import EPSILON, Training
from .accelerator import require_wide


def optimizer_of(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """Return the optimizer of a training, of all that can learn in ``model``.

    Raises `UnsupportedError` if nothing can, or what can is in half precision.
    """
    groups = param_groups(model, training.weight_decay, gate_lr=training.lr * training.gate_lr)
    if not groups:
        raise UnsupportedError(
            f"expected a model with parameters to train, received none with train={training.train!r}"
        )
    require_wide([parameter for group in groups for parameter in group["params"]])
    rules: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": partial(torch.optim.SGD, momentum=training.setting("momentum")),
        "adam": partial(torch.optim.Adam, eps=EPSILON),
        "adamw": partial(torch.optim.AdamW, eps=EPSILON),
        "amsgrad": partial(torch.optim.Adam, eps=EPSILON, amsgrad=True),
    }
    return rules[training.optimizer](groups, lr=training.lr)
