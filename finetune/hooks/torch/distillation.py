"""What distillation computes with PyTorch models."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....frameworks.torch import call, inference
from ...calibration.torch.layers import all_layers
from ..scores import logits, scores
from .hooks import replaced

__all__ = ["all_layers", "distance", "divergence", "infer", "record", "replaced"]

Note = Callable[[str, Tensor, bool], None]


def record(model: nn.Module, names: Iterable[str], note: Note) -> list[Callable[[], None]]:
    """Tell ``note`` what the named layers return, and whether it is learned from, and return what ends it."""
    layers = all_layers(model)

    def hook(name: str) -> Callable[..., None]:
        return lambda layer, inputs, output: note(name, output, torch.is_grad_enabled())

    return [layers[name].register_forward_hook(hook(name)).remove for name in names]


def infer(teacher: nn.Module, x: Any) -> Any:
    """Return the teacher's scores."""
    with inference(teacher):
        return scores(call(teacher, x))


def divergence(output: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Return T²·KL(wanted || output) of scores (N, classes, ...), which may be probabilities."""
    soft = (logits(each.float(), torch, axis=1) / temperature for each in (output, wanted))
    student, teacher = (F.log_softmax(each, dim=1) for each in soft)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1).mean() * temperature**2


def distance(output: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared distance over the variance of ``wanted``, where that varies."""
    output, wanted = output.float(), wanted.float()
    var = (wanted - wanted.mean()).square().mean()
    return F.mse_loss(output, wanted) / torch.where(var > 0, var, 1.0)
