"""The header of a safetensors file, of which the library takes the last where a name is there twice."""

from pathlib import Path

from ..errors import InputError
from ..formats.place import Place
from ..formats.text import json_object

_MOST = 100_000_000
"""How long a header the library reads."""


def require_header(path: Path) -> None:
    """Raise `InputError` unless a safetensors file begins with JSON that names each tensor once."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= _MOST else b""
    if len(header) != length or length < 2:
        raise InputError(f"expected weights in {path}, received a damaged file: its header is cut off")
    json_object(header, Place(str(path), remedy="get the file once more"))
