"""A moving average of a PyTorch model's weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class Average:
    """An exponential moving average of weights; none with a decay of 0."""

    def __init__(self, weights: Sequence[nn.Parameter], decay: float) -> None:
        self.weights, self.decay = weights, decay
        self.values = [weight.detach().clone() for weight in weights] if decay else []

    def update(self) -> None:
        """Move towards the weights."""
        if self.values:
            with torch.no_grad():
                torch._foreach_lerp_(self.values, list(self.weights), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the weights the average's values for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        with torch.no_grad():
            for weight, value in zip(self.weights, self.values, strict=False):
                kept = weight.detach().clone()
                weight.copy_(value)
                value.copy_(kept)
