"""A moving average of a Keras model's weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from keras import ops

from .variables import assign, copied


class Average:
    """An exponential moving average of weights; none with a decay of 0."""

    def __init__(self, weights: Sequence[Any], decay: float) -> None:
        self.weights, self.decay = weights, decay
        self.values = [copied(weight) for weight in weights] if decay else []

    def update(self) -> None:
        """Move towards the weights."""
        for value, weight in zip(self.values, self.weights, strict=False):
            value += (1 - self.decay) * (ops.convert_to_numpy(weight) - value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the weights the average's values for a while."""
        kept = [copied(weight) for weight in self.weights] if self.values else []
        assign(self.weights, self.values)
        try:
            yield
        finally:
            assign(self.weights, kept)
