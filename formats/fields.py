"""Plain data as what a dataclass declares: every field of its type, none missing and none unknown."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import InputError
from .place import Place, shown

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

T = TypeVar("T")

_EXPECTED: Mapping[str, str] = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "an object",
    "dataclass_type": "an object",
    "none_required": "null",
    "missing": "a value",
    "missing_argument": "a value",
}
"""What is expected where pydantic finds something else, by its names for what it finds."""
_UNKNOWN = ("unexpected_keyword_argument", "unexpected_positional_argument", "extra_forbidden")


def read(kind: type[T], data: Any, place: Place) -> T:
    """Return plain data, as JSON or TOML have it, as an object of ``kind``.

    Nothing is converted but a list to a tuple and an integer to a float: text is no number, and a truth value neither.

    Args:
        kind: A dataclass, or any type made of such.
        data: What was read, of dicts, lists, texts, numbers, truth values and None.
        place: Where it was read, for messages.

    Raises:
        InputError: For the first field that is missing, unknown or of another type, by its name; for what the dataclass
            itself refuses.
    """
    from pydantic import ValidationError

    try:
        text = json.dumps(data, default=lambda value: {"": str(value)})
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(place.said("plain data as in JSON", f"other data: {error}")) from None
    wanted: Any = kind
    try:
        result: T = _adapter(wanted).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        raise InputError(_message(kind, error.errors(include_url=False), data, place)) from None
    return result


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _message(kind: Any, found: "list[ErrorDetails]", data: Any, place: Place) -> str:
    """Return what is said of the first field that is not as it should be, and how many more there are."""
    errors: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    for error in found:
        errors.setdefault(_way(error["loc"], data), []).append(error)
    way, first = next(iter(errors.items()))
    refused = first[0].get("ctx", {}).get("error")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if isinstance(refused, ValueError):  # what the dataclass itself says
        at = str(place.of(*way)).strip()
        return f"{refused}{f' ({at})' if at else ''}{more}"
    received = f"{_received(way, data)}{more}"
    if first[0]["type"] in _UNKNOWN:
        known = ", ".join(field.name for field in fields(kind)) if is_dataclass(kind) and len(way) == 1 else ""
        expected = f"no field but {known}" if known else "no such field"
        return place.of(*way).said(expected, received)
    return place.of(*way).said(" or ".join(dict.fromkeys(map(_expected, first))), received)


def _expected(error: "ErrorDetails") -> str:
    if error["type"] == "literal_error":
        return str(error["ctx"]["expected"])
    if error["type"] == "json_invalid":
        return "text, numbers and lists that JSON can hold"
    return _EXPECTED.get(error["type"]) or error["msg"].removeprefix("Input should be ")


_NONE = object()


def _way(location: tuple[str | int, ...], data: Any) -> tuple[str | int, ...]:
    """Return the way to a field without what pydantic adds to it, the names of the types that it could have been."""
    way: list[str | int] = []
    for number, step in enumerate(location):
        inside = _member(data, step)
        if inside is not _NONE:
            way.append(step)
            data = inside
        elif number == len(location) - 1 and (isinstance(data, dict) or isinstance(step, int)):  # missing
            way.append(step)
    return tuple(way)


def _member(data: Any, step: str | int) -> Any:
    if isinstance(data, dict):
        return data.get(step, _NONE)
    inside = isinstance(data, list | tuple) and isinstance(step, int) and step < len(data)
    return data[step] if inside else _NONE


def _received(way: tuple[str | int, ...], data: Any) -> str:
    for step in way:
        data = _member(data, step)
    return "none" if data is _NONE else shown(data)
