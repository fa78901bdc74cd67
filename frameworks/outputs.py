"""What a model returns, taken apart: every tensor by its place."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from ..errors import UnsupportedError
from .example import Place, is_array


def outputs_of(result: Any, read: Callable[[Any], Any]) -> dict[Place, Any]:
    """Return every tensor that a model returned by its place, see `tensors_in`; raises `UnsupportedError` for none."""
    found = dict(tensors_in(result, read))
    if not found:
        raise UnsupportedError(f"expected a model that returns tensors, received one that returns {result!r}")
    return found


def tensors_in(result: Any, read: Callable[[Any], Any], place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield every tensor that a model returned with the way to it: keys, indexes, and fields of dataclasses.

    ``read`` makes a tensor of what a framework takes for a number, takes a class apart that the framework knows, and
    returns everything else as it is. None is nothing. Raises `UnsupportedError` for anything else, which a file could
    not return either.
    """
    value = read(result)
    if is_array(value):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, read, (*place, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors_in(item, read, (*place, index))
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name), read, (*place, field.name))
    elif value is not None:
        where = ".".join(map(str, place))
        raise UnsupportedError(
            "expected a model that returns tensors, in tuples, lists, mappings or dataclasses, received "
            f"{type(value).__name__}{where and f' as output {where}'}; return the tensors in it"
        )
