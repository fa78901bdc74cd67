"""JSON and TOML as plain data: UTF-8, no key twice in an object, and no deeper than anything we write."""

import json
import tomllib
from collections.abc import Callable
from typing import Any

from ..errors import InputError
from .place import Place, shown

DEEPEST = 100
"""How deep objects and lists may lie in each other."""


def from_json(content: str | bytes, place: Place) -> Any:
    """Return what JSON says; raises `InputError` for other text, a key that is there twice, and too deep a nesting."""
    return _parsed("JSON", content, place, lambda text: json.loads(text, object_pairs_hook=_object))


def from_toml(content: str | bytes, place: Place) -> dict[str, Any]:
    """Return what TOML says; raises `InputError` for other text and too deep a nesting."""
    return _parsed("TOML", content, place, tomllib.loads)  # type: ignore[no-any-return]


def json_object(content: str | bytes, place: Place) -> dict[str, Any]:
    """Return the object in JSON text; raises `InputError` as `from_json` does, and for anything but an object."""
    data = from_json(content, place)
    if not isinstance(data, dict):
        raise InputError(place.said("an object", shown(data)))
    return data


def _parsed(form: str, content: str | bytes, place: Place, parse: Callable[[str], Any]) -> Any:
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        data = parse(text)
    except _TwiceError as error:
        raise InputError(place.said("each key of an object once", f"{error} twice")) from None
    except RecursionError:
        data = None
    except ValueError as error:
        raise InputError(place.said(form, f"text that is not: {error}")) from None
    else:
        if not _is_too_deep(data):
            return data
    raise InputError(place.said(f"{form} nested no deeper than {DEEPEST} levels", "deeper")) from None


class _TwiceError(Exception):
    """A key that an object has twice, of which readers take the first or the last as they like."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(shown(key))
        found[key] = value
    return found


def _is_too_deep(data: Any) -> bool:
    level = [data] if isinstance(data, dict | list) else []
    for _ in range(DEEPEST):
        members = [member for each in level for member in (each.values() if isinstance(each, dict) else each)]
        level = [member for member in members if isinstance(member, dict | list)]
        if not level:
            return False
    return True
