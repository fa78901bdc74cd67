"""Match a recipe's names with a model's where Keras made them up.

Keras numbers the layers it names itself, ``batch_normalization``, ``batch_normalization_1`` and so on, through all
models of a process: the same code run later has the same layers under higher numbers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...convert.recipe import Recipe
from ...errors import InputError


def renamed(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """Return ``recipe`` with the names of this model's BatchNorms, in which only numbers may differ.

    Names that are alike but for numbers are matched in the order of those. Raises `InputError` if the recipe does not
    name all of them, since then no order tells which are meant.
    """
    known = set(names)
    if all(choice.name in known for choice in recipe.choices):
        return recipe
    wanted, found = _families([choice.name for choice in recipe.choices]), _families(names)
    new: dict[str, str] = {}
    for stem, theirs in wanted.items():
        mine = found.get(stem, [])
        if len(mine) == len(theirs):
            new.update(zip(theirs, mine, strict=True))
        elif mine and not known.issuperset(theirs):
            raise InputError(
                f"expected a recipe with the names of this model, received one that names {len(theirs)} of "
                f"{len(mine)} layers that Keras numbers otherwise here: {_some(theirs)} in the recipe, {_some(mine)} "
                "in the model; build the model in a fresh process, or give its BatchNormalization layers names"
            )
    return replace(recipe, choices=tuple(replace(c, name=new.get(c.name, c.name)) for c in recipe.choices))


def fronts_of(recipe: Recipe, found: Mapping[str, str], layers: Sequence[str]) -> Recipe:
    """Return ``recipe`` with the names that the layers in front have in this model.

    ``found`` tells by a norm's name what is in front of it where that was seen. Names that are not those of ``layers``
    are matched in the order of their numbers where just as many are alike; others stay.
    """
    wanted = [choice.front for choice in recipe.choices if choice.front]
    new = alike(wanted, layers)
    choices = [
        replace(c, front=found.get(c.name) or new.get(c.front, c.front)) if c.front else c for c in recipe.choices
    ]
    return replace(recipe, choices=tuple(choices))


def alike(wanted: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return for those wanted that are no names which they are, if names that differ in numbers are as many."""
    unknown, mine = _families([name for name in wanted if name not in names]), _families(names)
    pairs = [(theirs, mine.get(stem, [])) for stem, theirs in unknown.items()]
    return {a: b for theirs, own in pairs if len(theirs) == len(own) for a, b in zip(theirs, own, strict=True)}


def _families(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the names by what they are without numbers, in the order of the numbers."""
    families: dict[str, list[tuple[list[int], str]]] = {}
    for name in names:
        parts = [re.fullmatch(r"(.*?)(?:_(\d+))?", part, re.DOTALL) for part in name.split("/")]
        stem = "/".join(part[1] for part in parts if part)
        families.setdefault(stem, []).append(([int(part[2] or 0) for part in parts if part], name))
    return {stem: [name for _, name in sorted(members)] for stem, members in families.items()}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
