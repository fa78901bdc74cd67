"""One or several, wherever a caller may give either: texts, and batches of inputs."""

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import InputError
from .example import Inputs, is_array


def texts(given: Any, expected: str) -> tuple[str, ...]:
    """Return one text, several or none (None) as a tuple; raises `InputError` for what is no text."""
    found = (given,) if isinstance(given, str | bytes) or not isinstance(given, Iterable) else tuple(given)
    found = () if given is None else found
    if others := [each for each in found if not isinstance(each, str)]:
        raise InputError(f"expected {expected} or several, each a text, received {others[0]!r}")
    return found


def batches(given: Any) -> Iterable[Any]:
    """Return batches of inputs, to be iterated over as often as one likes: an iterator is held in memory.

    An array, a mapping or `Inputs` is a batch by itself, which is not to be taken apart. Raises `InputError` for what
    has no batches.
    """
    if is_array(given) or isinstance(given, Inputs | Mapping):
        return [given]
    kind = type(given)
    if isinstance(given, str | bytes) or not (hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")):
        raise InputError(f"expected batches of inputs as the model takes them, received {reprlib.repr(given)}")
    return list(given) if isinstance(given, Iterator) else given
