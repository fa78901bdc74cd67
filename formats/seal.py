"""A hash over what a file itself says, for a change in it to be seen."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .place import Place

SEAL = "seal"


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data with the `SEAL` over all the rest of it."""
    return {**data, SEAL: _hash(data)}


def unsealed(data: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Return the data without its seal; raises `InputError` if it is not that over the rest.

    It tells damage and hasty edits, not who wrote the file: whoever changes that can seal it again.
    """
    rest = {key: value for key, value in data.items() if key != SEAL}
    if data.get(SEAL) != _hash(rest):
        received = "one that has changed" if SEAL in data else "one without its seal"
        raise InputError(place.said("a file as it was written", received))
    return rest


def _hash(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
