"""Weights of a Keras model on disk."""

from pathlib import Path
from typing import Any

from ...errors import InputError
from ..files import require_file
from ..misfit import PATCHED, PatchedWeightsError
from .model_file import reason
from .other_norms import holds_other_norms


def load_weights(model: Any, path: Path) -> None:
    """Give a Keras model the weights in ``path``; raises `InputError` if they do not fit."""
    require_file(path)
    try:
        model.load_weights(path)
    except Exception as error:
        message = f"expected weights for this model in {path}, received: {reason(error)}"
        if path.suffix in (".h5", ".hdf5") and holds_other_norms(path):
            raise PatchedWeightsError(f"{message}\n  {PATCHED}") from error
        raise InputError(message) from error


def write_weights(model: Any, path: Path) -> None:
    """Write the whole model to ``path``, a ``.keras`` file."""
    model.save(path)
