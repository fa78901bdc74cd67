"""Passes of a Keras model that nothing is learned from."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import keras

INFERS = ContextVar("infers", default=False)
"""Whether what runs is within `inference`."""


@contextmanager
def inference() -> Iterator[None]:
    """Run the body without gradients, and without a `Distillation` taking note of it."""
    token = INFERS.set(True)
    try:
        with _without_gradients():
            yield
    finally:
        INFERS.reset(token)


def _without_gradients() -> Any:
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return nullcontext()
