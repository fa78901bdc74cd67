"""What a PyTorch model is trained for: labels, or the model before the patch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...hooks.distillation import Distillation
from ...hooks.scores import Logits, class_count
from ...hooks.torch.distillation import as_logits, infer
from ..training import Array, Training

Criterion = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""The loss, and how many labels were right where they count, as a function of inputs, scores and labels."""


@contextmanager
def criterion(model: nn.Module, teacher: nn.Module | None, training: Training, images: Array) -> Iterator[Criterion]:
    """Yield the loss; the scores of ``images`` decide whether a model returns probabilities.

    Raises `UnsupportedError` for labels without scores (N, classes).
    """
    if teacher is not None:
        with Distillation(model, teacher, training.temperature, training.features) as distillation:
            distillation.decide(images)
            yield lambda x, output, labels: (distillation(x, output), None)
        return
    known = Logits()
    found = infer(model, images)
    class_count(found)
    as_logits(found, known)
    yield lambda x, output, labels: (
        F.cross_entropy(known(output, torch), labels),
        (output.detach().argmax(1) == labels).sum(),
    )
