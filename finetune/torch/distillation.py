"""What distillation computes with PyTorch models."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...patchers.torch_sites import call, inference
from .hooks import replaced
from .sites import all_layers

__all__ = ["all_layers", "distance", "divergence", "infer", "record", "replaced"]


def record(model: nn.Module, names: Iterable[str], outputs: dict[str, Tensor]) -> list[Callable[[], None]]:
    """Write what the named layers return into ``outputs`` from now on, and return what ends it."""
    layers = all_layers(model)

    def hook(name: str) -> Callable[..., None]:
        def note(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            outputs[name] = output

        return note

    return [layers[name].register_forward_hook(hook(name)).remove for name in names]


def infer(teacher: nn.Module, x: Any) -> Any:
    """Return the teacher's output."""
    with inference(teacher):
        return call(teacher, x)


def divergence(output: Any, wanted: Any, temperature: float) -> Tensor:
    """Return T²·KL(wanted || output) of scores (N, classes, ...)."""
    student, teacher = (F.log_softmax(_scores(each).float() / temperature, dim=1) for each in (output, wanted))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1).mean() * temperature**2


def distance(output: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared distance over the variance of ``wanted``, where that varies."""
    output, wanted = output.float(), wanted.float()
    var = (wanted - wanted.mean()).square().mean()
    return F.mse_loss(output, wanted) / torch.where(var > 0, var, 1.0)


def _scores(output: Any) -> Tensor:
    scores: Tensor = output["logits"] if isinstance(output, Mapping) else output
    return scores
