"""Names: of layers that may have several, and of tensors in a structure, none of which may have another's."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeVar

Layer = TypeVar("Layer")


def first_names(layers: Iterable[tuple[str, Layer]]) -> dict[str, Layer]:
    """Return every layer once, by the first of its names."""
    found: dict[int, tuple[str, Layer]] = {}
    for name, layer in layers:
        found.setdefault(id(layer), (name, layer))
    return dict(found.values())


def unique(name: str, taken: Collection[str | None]) -> str:
    """Return ``name``, or ``"name_2"`` and so on where it is taken."""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def distinct(places: Sequence[Sequence[Any]], taken: Iterable[str] = (), *, joint: str = "_") -> list[str]:
    """Return a name for each place in a structure: its parts joined, with a number where that name is taken.

    A place of one part has a name that somebody gave, and comes before names that are put together. Whatever can have
    its name has it, whichever comes first.
    """
    wanted = [joint.join(map(str, place)) for place in places]
    order = sorted(range(len(wanted)), key=lambda index: len(places[index]) > 1)
    used = set(taken)
    names: dict[int, str] = {}
    for index in order:
        if wanted[index] not in used:
            names[index] = wanted[index]
            used.add(wanted[index])
    for index in (index for index in order if index not in names):
        names[index] = unique(wanted[index], used)
        used.add(names[index])
    return [names[index] for index in range(len(wanted))]
