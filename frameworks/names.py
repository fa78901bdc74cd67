"""Layers by name, where one may have several names."""

from collections.abc import Iterable
from typing import TypeVar

Layer = TypeVar("Layer")


def first_names(layers: Iterable[tuple[str, Layer]]) -> dict[str, Layer]:
    """Return every layer once, by the first of its names."""
    found: dict[int, tuple[str, Layer]] = {}
    for name, layer in layers:
        found.setdefault(id(layer), (name, layer))
    return dict(found.values())
