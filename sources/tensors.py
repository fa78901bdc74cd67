"""Tensors in a safetensors file, whose header the library believes: the last of a name that is there twice."""

from pathlib import Path
from typing import Any

import safetensors.numpy
from safetensors import SafetensorError

from ..formats.place import Place
from ..formats.text import json_object
from .archives import size
from .files import damaged, require_file

_MOST = 100_000_000
"""How long a header the library reads."""


def header_of(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file; raises `InputError` unless it is JSON that names each tensor once."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MOST:
            raise damaged("weights", path, f"its header says to be of {size(length)}")
        header = file.read(length)
    if len(header) != length or length < 2:
        raise damaged("weights", path, "its header is cut off")
    return json_object(header, Place(str(path), remedy="get the file once more"))


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors do: with the length of a header, and an object in it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 2 <= length <= _MOST and file.read(1) == b"{"


def read_arrays(path: Path) -> dict[str, Any]:
    """Return the arrays in a safetensors file by name; raises `InputError` if it is damaged or has other tensors."""
    require_file(path, "tensors")
    header_of(path)
    try:
        return safetensors.numpy.load(path.read_bytes())
    except (SafetensorError, KeyError, ValueError) as error:
        raise damaged("tensors", path, str(error)) from None
