"""Weights in HDF5 of norms that are not Keras's own."""

import re
from pathlib import Path
from typing import Any

_PART = re.compile(r"(?:^|[/_])(mean_weights|variance_weights|running_std|gamma)(?::\d+)?$")


def holds_other_norms(path: Path) -> bool:
    """Return whether an HDF5 file holds anything that looks like a norm of one of the three Keras systems.

    They are keras-switchnorm and BatchRenormalization, known by the names of their weights, and
    GroupNormalization-keras, whose gamma is of rank 2 or 4; see `normswap.interop.keras_h5`. A damaged file holds
    none.
    """
    import h5py

    found = []

    def look(name: str, member: Any) -> None:
        part = _PART.search(name)
        if part and isinstance(member, h5py.Dataset) and (part[1] != "gamma" or member.ndim in (2, 4)):
            found.append(name)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(look)
    except (OSError, RuntimeError, KeyError, ValueError):
        return False
    return bool(found)
