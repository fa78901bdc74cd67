"""Tensors in a safetensors file, whose header the library believes: the last of a name that is there twice."""

from pathlib import Path
from typing import Any

import safetensors.numpy
from safetensors import SafetensorError

from ..errors import InputError
from ..formats.place import Place
from ..formats.text import json_object
from .files import require_file

_MOST = 100_000_000
"""How long a header the library reads."""


def header_of(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file; raises `InputError` unless it is JSON that names each tensor once."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= _MOST else b""
    if len(header) != length or length < 2:
        raise InputError(f"expected weights in {path}, received a damaged file: its header is cut off")
    return json_object(header, Place(str(path), remedy="get the file once more"))


def read_arrays(path: Path) -> dict[str, Any]:
    """Return the arrays in a safetensors file by name; raises `InputError` if it is damaged or has other tensors."""
    require_file(path, "tensors")
    header_of(path)
    try:
        return safetensors.numpy.load(path.read_bytes())
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"expected tensors in {path}, received a damaged file: {error}") from None
