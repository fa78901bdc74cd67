"""Weights of a Keras model on disk."""

from pathlib import Path
from typing import Any

from ...errors import InputError
from ..files import require_file
from ..misfit import PatchedWeightsError, misfit, patched_way_out
from .hdf5 import HDF5_SUFFIXES, require_hdf5, require_readable
from .misfits import noting, of_legacy
from .model_file import reason, require_h5py
from .other_norms import has_other_norms, holds_other_norms


def load_weights(model: Any, path: Path) -> None:
    """Give a Keras model the weights in ``path``; raises `InputError` if they do not fit."""
    require_file(path)
    require_h5py(path)
    require_hdf5(path, "weights for this model")
    require_readable(path, "weights for this model")
    if path.suffix in HDF5_SUFFIXES and holds_other_norms(path) and not has_other_norms(model):
        # Keras would take those of Batch Renormalization for a BatchNorm's, whatever their epsilon and order.
        raise PatchedWeightsError(
            f"expected weights for this model in {path}, received another network's:\n  {patched_way_out()}"
        )
    with noting(model) as told:
        try:
            model.load_weights(path)
        except Exception as error:
            misfits = told() or (of_legacy(model, path) if path.suffix in HDF5_SUFFIXES else None)
            if not misfits:
                raise InputError(f"expected weights for this model in {path}, received: {reason(error)}") from error
        else:
            misfits = told()  # that Keras passes over
    if misfits:
        raise misfit(str(path), misfits.missing, misfits.unexpected, misfits.shapes)


def write_weights(model: Any, path: Path) -> None:
    """Write the whole model to ``path``, a ``.keras`` file."""
    model.save(path)
