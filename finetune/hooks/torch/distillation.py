"""What distillation computes with PyTorch models."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....frameworks.torch import call, inference
from ..scores import Logits, scores


def learns() -> bool:
    """Return whether what runs is to be learned from, and is no pass at inference."""
    return torch.is_grad_enabled()


def infer(model: nn.Module, x: Any) -> Any:
    """Return the scores of a model at inference, without gradients."""
    with inference(model):
        return scores(call(model, x))


def as_logits(scores: Tensor, known: Logits) -> Tensor:
    """Return the logits (N, classes, ...) of scores, which decide what is ``known`` where their values can be read."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if known.probabilities is None and not torch.compiler.is_compiling():
        known.decide(wide.detach().cpu().numpy(), axis=1)
    logits: Tensor = known(wide, torch, axis=1)
    return logits


def divergence(output: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Return T²·KL(wanted || output) of logits (N, classes, ...)."""
    student, teacher = (F.log_softmax(each / temperature, dim=1) for each in (output, wanted))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1).mean() * temperature**2


def distance(output: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared distance over the variance of ``wanted``, where that varies."""
    output, wanted = output.float(), wanted.float()
    var = (wanted - wanted.mean()).square().mean()
    return F.mse_loss(output, wanted) / torch.where(var > 0, var, 1.0)
