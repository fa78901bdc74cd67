"""Weights of a Keras model on disk."""

from pathlib import Path
from typing import Any

from ...errors import InputError
from ..files import require_file
from .model_file import reason


def load_weights(model: Any, path: Path) -> None:
    """Give a Keras model the weights in ``path``; raises `InputError` if they do not fit."""
    require_file(path)
    try:
        model.load_weights(path)
    except Exception as error:
        raise InputError(f"expected weights for this model in {path}, received: {reason(error)}") from error


def write_weights(model: Any, path: Path) -> None:
    """Write the whole model to ``path``, a ``.keras`` file."""
    model.save(path)
