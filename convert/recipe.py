"""What each BatchNorm of a model becomes, as a small JSON file.

A `Recipe` is a plan's choices site by site, which replays on a fresh copy of the same model. `Rules` are what people
write by hand: targets by name, depth or stage, which a plan resolves to a recipe.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import InputError
from ..formats.fields import read
from ..formats.place import Place
from ..formats.text import json_object
from .targets import Mode, Target, as_target, described, target_from_dict, target_to_dict

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Choice:
    """What one site becomes: its name, what it was, and its target with every default resolved.

    ``spatial`` is the shape behind the channels seen when the choice was made: () for (N, C) input, or None. ``front``
    is the name of the layer in front that takes a scale, and with the mode ``"full"`` a shift; "" where none does.
    """

    name: str
    source: str
    channels: int
    target: Target
    spatial: tuple[int, ...] | None = None
    front: str = ""
    mode: Mode | None = None

    def since(self, earlier: "Choice") -> "Choice":
        """Return the choice for the site as it was before ``earlier``, whose layer in front stays as that made it."""
        front = self if self.front else earlier
        return replace(self, source=earlier.source, front=front.front, mode=front.mode)


@dataclass(frozen=True)
class Recipe:
    """The choices for every replaced site of one model, in the model's own order, to be replayed on a fresh copy.

    A plan and a report make one (``plan.recipe()``, ``report.recipe``), `plan` and `patch` take one as their target.

    Args:
        framework: ``"torch"`` or ``"keras"``.
        choices: One `Choice` for each replaced site, every setting resolved.

    Raises:
        InputError: By `from_json` and `from_dict`, for text or data that is no recipe.

    Example:
        >>> import normswap, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> text = normswap.plan(model, "gn").recipe().to_json()
        >>> recipe = normswap.Recipe.from_json(text)
        >>> [(choice.name, choice.target.groups) for choice in recipe.choices]
        [('1', 1)]
        >>> normswap.patch(model, recipe).summary
        '1 replaced, 0 already patched, 0 skipped'
    """

    framework: str
    choices: tuple[Choice, ...]

    def after(self, earlier: "Recipe") -> "Recipe":
        """Return the recipe that makes of the model before ``earlier`` what this one made of the model after it.

        A site of both was before what ``earlier`` says.
        """
        before = {choice.name: choice for choice in earlier.choices}
        new = {c.name: c.since(before[c.name]) if c.name in before else c for c in self.choices}
        kept = tuple(choice for choice in earlier.choices if choice.name not in new)
        return Recipe(self.framework, (*kept, *new.values()))

    def in_words(self) -> str:
        """Return what it makes, each kind with the number of its layers."""
        counts = Counter(described(choice.target) for choice in self.choices)
        return ", ".join(f"{n} layer{'' if n == 1 else 's'} to {text}" for text, n in counts.items()) or "none"

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "framework": self.framework,
            "sites": [
                {
                    "name": choice.name,
                    "source": choice.source,
                    "channels": choice.channels,
                    "spatial": None if choice.spatial is None else list(choice.spatial),
                    "target": target_to_dict(choice.target),
                    "equalize": {"front": choice.front, "mode": choice.mode} if choice.front else None,
                }
                for choice in self.choices
            ],
        }

    def to_json(self) -> str:
        """Return the recipe as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: Any, place: Place = Place()) -> "Recipe":  # noqa: B008 - it never changes
        """Return the recipe that `to_dict` wrote; raises `InputError`, which names the ``place``, for other data."""
        found = read(_File, data, place)
        choices = tuple(
            Choice(
                site.name,
                site.source,
                site.channels,
                target_from_dict(site.target, place.of("sites", number, "target")),
                site.spatial,
                *((site.equalize.front, site.equalize.mode) if site.equalize else ()),
            )
            for number, site in enumerate(found.sites)
        )
        return cls(found.framework, choices)

    @classmethod
    def from_json(cls, text: str | bytes, place: Place = Place()) -> "Recipe":  # noqa: B008 - it never changes
        """Return the recipe in ``text``, which may be a larger object that holds one, such as a bundle's manifest.

        Raises `InputError` if there is none.
        """
        return _recipe_in(json_object(text, place), place)


def _recipe_in(data: Mapping[str, Any], place: Place) -> Recipe:
    if isinstance(inner := data.get("recipe"), dict):
        return Recipe.from_dict(inner, place.of("recipe"))
    return Recipe.from_dict(data, place)


@dataclass(frozen=True)
class _Equalize:
    front: str
    mode: Mode

    def __post_init__(self) -> None:
        if not self.front:
            raise InputError("expected `front` as the name of a layer, received front=''")


@dataclass(frozen=True)
class _Site:
    """A `Choice` in a file."""

    name: str
    source: str
    channels: int
    target: dict[str, Any]
    spatial: tuple[int, ...] | None = None
    equalize: _Equalize | None = None

    def __post_init__(self) -> None:
        if self.channels < 1 or min(self.spatial or (1,)) < 1:
            raise InputError(f"expected sizes above 0, received channels={self.channels} and spatial={self.spatial}")


@dataclass(frozen=True)
class _File:
    """A `Recipe` in a file."""

    schema_version: Literal[1]
    framework: Literal["torch", "keras"]
    sites: tuple[_Site, ...]


@dataclass(frozen=True)
class Rule:
    """What the sites become that fit all of what it says.

    Args:
        target: A `SwitchNorm`, `BatchRenorm`, `GroupNorm` or `BatchNorm`; None leaves the sites as they are.
        match: A glob on a site's name, or a regular expression after ``re:``.
        depth: A share of the model's sites in order, from 0 (the first) to 1 (the last): ``(0, 1/3)`` is the first
            third.
        stage: The number of a size of maps, counted from the largest, 0; it needs an example.

    Raises:
        InputError: If ``target`` is none, ``match`` no text, ``depth`` no range or ``stage`` no count.

    Example:
        >>> import normswap
        >>> print(normswap.Rule(normswap.GroupNorm(groups=8), match="layer4.*", depth=(0.5, 1)))
        match='layer4.*', depth=(0.5, 1)
    """

    target: Target | None
    match: str = "*"
    depth: tuple[float, float] | None = None
    stage: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.target, Target | None):
            raise InputError(
                "expected `target` as a SwitchNorm, BatchRenorm, GroupNorm or BatchNorm, or None, received "
                f"target={self.target!r}"
            )
        if not isinstance(self.match, str):
            raise InputError(
                f"expected `match` as a glob, or a regular expression after re:, received match={self.match!r}"
            )
        if self.depth is not None and not _is_range(self.depth):
            raise InputError(f"expected `depth` as two numbers from 0 to 1, the smaller first, received {self!s}")
        if self.stage is not None and not (type(self.stage) is int and self.stage >= 0):
            raise InputError(f"expected `stage` as a number from 0, the largest maps, received {self!s}")

    def __str__(self) -> str:
        said = {"match": self.match, "depth": self.depth, "stage": self.stage}
        return ", ".join(f"{key}={value!r}" for key, value in said.items() if value is not None)


@dataclass(frozen=True)
class Rules:
    """Targets for the sites of any model: the first rule that a site fits says what it becomes.

    A site that fits none is left as it is. In a file::

        {"schema_version": 1,
         "rules": [{"match": "layer4.*", "target": "leave"},
                   {"depth": [0, 0.5], "target": {"kind": "sn", "batch_statistics": "frozen"}},
                   {"match": "*", "target": "gn"}]}

    Args:
        rules: The `Rule` objects, in the order in which they are asked.

    Raises:
        InputError: For other objects; by `from_dict`, for data that are no rules; by `plan` and `patch`, if a rule fits
            no site.

    Example:
        >>> import normswap, torch
        >>> norms = [torch.nn.BatchNorm2d(8) for _ in range(3)]
        >>> rules = normswap.Rules((
        ...     normswap.Rule(None, match="2"),
        ...     normswap.Rule(normswap.SwitchNorm(), depth=(0, 1 / 3)),
        ...     normswap.Rule(normswap.GroupNorm()),
        ... ))
        >>> plan = normswap.plan(torch.nn.Sequential(*norms), rules)
        >>> [(d.site.name, d.target.kind if d.action == "replace" else d.note) for d in plan.decisions]
        [('0', 'sn'), ('1', 'gn'), ('2', 'left by rule 1')]
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.rules, Sequence) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise InputError(f"expected `rules` as a tuple of Rule objects, received rules={self.rules!r}")

    @classmethod
    def from_dict(cls, data: Any, place: Place = Place()) -> "Rules":  # noqa: B008 - it never changes
        """Return the rules in plain data; raises `InputError`, which names the ``place``, for other data."""
        found = read(_RulesFile, data, place)
        if not found.rules:
            raise InputError(place.of("rules").said("one rule or more", "none"))
        return cls(tuple(_rule(rule, place.of("rules", number)) for number, rule in enumerate(found.rules)))


def recipe_from_json(text: str | bytes, place: Place = Place()) -> Recipe | Rules:  # noqa: B008 - it never changes
    """Return the rules or the recipe in JSON ``text``; raises `InputError` if it is neither."""
    data = json_object(text, place)
    return Rules.from_dict(data, place) if "rules" in data else _recipe_in(data, place)


@dataclass(frozen=True)
class _RuleForm:
    """A `Rule` in a file."""

    target: str | dict[str, Any]
    match: str = "*"
    depth: tuple[float, float] | None = None
    stage: int | None = None


@dataclass(frozen=True)
class _RulesFile:
    """`Rules` in a file."""

    schema_version: Literal[1]
    rules: tuple[_RuleForm, ...]


def _rule(form: _RuleForm, place: Place) -> Rule:
    target: Target | None = None
    if isinstance(form.target, dict):
        target = target_from_dict(form.target, place.of("target"))
    try:
        if isinstance(form.target, str) and form.target != "leave":
            target = as_target(form.target)
        return Rule(target, form.match, form.depth, form.stage)
    except InputError as error:
        raise InputError(f"{error} ({str(place).strip()})") from None


def _is_range(depth: Any) -> bool:
    numbers = isinstance(depth, tuple) and len(depth) == 2 and all(type(end) in (int, float) for end in depth)
    return numbers and 0 <= depth[0] < depth[1] <= 1
