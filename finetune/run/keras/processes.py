"""The replicas that train a Keras model together, in one process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from ....frameworks.keras import distinct_layers
from ....layers.keras.norm import MovingNorm
from .replicas import replicas


def place(model: keras.Model) -> None:
    """Put ``model`` where it will be trained, which in Keras is where it was made."""


def processes() -> tuple[int, int]:
    """Return this process's rank and how many train together: Keras trains in one."""
    return 0, 1


def agree(model: keras.Model) -> None:
    """Give the model of every process what rank 0's has: Keras trains in one."""


def gathered(value: Any) -> list[Any]:
    """Return the value of every process."""
    return [value]


@contextmanager
def synchronized(model: keras.Model) -> Iterator[None]:
    """Take the batch statistics of SN and BRN over all replicas for a while."""
    found = [layer for layer in distinct_layers(model) if isinstance(layer, MovingNorm)] if replicas() > 1 else []
    kept = [(layer, layer.synchronized) for layer in found]
    for layer in found:
        layer.synchronized = True
    try:
        yield
    finally:
        for layer, flag in kept:
            layer.synchronized = flag
