"""Weights on disk, of a model of either framework."""

from pathlib import Path
from typing import Any, Protocol

from ..frameworks.detect import framework_of

SUFFIX: dict[str, str] = {"torch": ".safetensors", "keras": ".keras"}
"""What the file that holds a model's weights ends in."""


class Weights(Protocol):
    """What reads and writes the weights of one framework's models."""

    def load_weights(self, model: Any, path: Path) -> None:
        """Give ``model`` the weights in ``path``; raises `InputError` if they do not fit."""

    def write_weights(self, model: Any, path: Path) -> None:
        """Write the model's weights to ``path``, which ends in its framework's `SUFFIX`."""


def load_weights(model: Any, path: Path) -> None:
    """Give ``model`` the weights in ``path``; raises `InputError` if they do not fit. Nothing in the file is run."""
    _weights_of(model).load_weights(model, path)


def write_weights(model: Any, path: Path) -> None:
    """Write the model's weights to ``path``, which ends in its framework's `SUFFIX`."""
    _weights_of(model).write_weights(model, path)


def _weights_of(model: Any) -> Weights:
    if framework_of(model) == "torch":
        from .torch import weights as torch_weights

        return torch_weights
    from .keras import weights as keras_weights

    return keras_weights
