"""Norms that are not Keras's own, in HDF5 and in a model."""

import re
from pathlib import Path
from typing import Any

_PARTS = re.compile(r"(?:^|[/_])(mean_weights|variance_weights|running_std|gamma)(?::\d+)?$")


def holds_other_norms(path: Path) -> bool:
    """Return whether a file is HDF5 with anything that looks like a norm of one of the three Keras systems.

    They are keras-switchnorm and BatchRenormalization, known by the names of their weights, and
    GroupNormalization-keras, whose gamma is of rank 2 or 4; see `normswap.interop.keras_h5`. A damaged file holds
    none.
    """
    import h5py

    found = []

    def look(name: str, member: Any) -> None:
        if isinstance(member, h5py.Dataset) and _is_of_another(name, member.shape):
            found.append(name)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(look)
    except (OSError, RuntimeError, KeyError, ValueError):
        return False
    return bool(found)


def has_other_norms(model: Any) -> bool:
    """Return whether a model has layers whose weights look like that, such as a port of one of those systems."""
    return any(_is_of_another(variable.name, variable.shape) for variable in model.weights)


def _is_of_another(name: str, shape: tuple[int, ...]) -> bool:
    part = _PARTS.search(name)
    return part is not None and (part[1] != "gamma" or len(shape) in (2, 4))
