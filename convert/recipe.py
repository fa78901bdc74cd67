"""What each BatchNorm of a model becomes, as a small JSON file.

A `Recipe` is a plan's choices site by site, which replays on a fresh copy of the same model. `Rules` are what people
write by hand: targets by name, depth or stage, which a plan resolves to a recipe.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import InputError
from .targets import Mode, Target, as_mode, as_target, target_from_dict, target_to_dict

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
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """Return the recipe that `to_dict` wrote; raises `InputError` if anything is missing or unknown."""
        _require_version("a recipe", data)
        try:
            choices = tuple(
                Choice(
                    name=site["name"],
                    source=site["source"],
                    channels=int(site["channels"]),
                    spatial=None if site.get("spatial") is None else tuple(map(int, site["spatial"])),
                    target=target_from_dict(site["target"]),
                    front=str((site.get("equalize") or {"front": ""})["front"]),
                    mode=as_mode(site["equalize"]["mode"]) if site.get("equalize") else None,
                )
                for site in data["sites"]
            )
            framework = str(data["framework"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                "expected a recipe with `framework` and `sites`, each site with name, source, channels and target; "
                f"received one where {error!r} is wrong"
            ) from None
        return cls(framework, choices)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Recipe":
        """Return the recipe in ``text``, which may be a larger object that holds one, such as a bundle's manifest.

        Raises `InputError` if there is none.
        """
        data = _json_object(text)
        return cls.from_dict(data["recipe"] if isinstance(data.get("recipe"), dict) else data)


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
    def from_dict(cls, data: Mapping[str, Any]) -> "Rules":
        """Return the rules in plain data; raises `InputError` for anything missing, unknown or malformed."""
        _require_keys("expected an object", data, ["schema_version", "rules"], ["schema_version", "rules"])
        _require_version("rules", data)
        if not isinstance(data["rules"], list) or not data["rules"]:
            raise InputError(f"expected `rules` as a list of objects, received rules={data['rules']!r}")
        return cls(tuple(_rule(number, rule) for number, rule in enumerate(data["rules"], 1)))


def recipe_from_json(text: str | bytes) -> Recipe | Rules:
    """Return the rules or the recipe in JSON ``text``; raises `InputError` if it is neither."""
    data = _json_object(text)
    return Rules.from_dict(data) if "rules" in data else Recipe.from_json(text)


def _rule(number: int, data: Any) -> Rule:
    if not isinstance(data, dict):
        raise InputError(f"rule {number}: expected an object, received {data!r}")
    known = [field.name for field in fields(Rule)]
    _require_keys(f"rule {number}: expected an object", data, known, ["target"])
    found = dict(data)
    target = found.pop("target")
    if isinstance(found.get("depth"), list):
        found["depth"] = tuple(found["depth"])
    try:
        if isinstance(target, dict):
            return Rule(target_from_dict(target), **found)
        return Rule(None if target == "leave" else as_target(target), **found)
    except InputError as error:
        raise InputError(f"rule {number}: {error}") from None


def _is_range(depth: Any) -> bool:
    numbers = isinstance(depth, tuple) and len(depth) == 2 and all(type(end) in (int, float) for end in depth)
    return numbers and 0 <= depth[0] < depth[1] <= 1


def _require_keys(what: str, data: Mapping[str, Any], known: list[str], needed: list[str]) -> None:
    if not data.keys() <= set(known) or not data.keys() >= set(needed):
        received = ", ".join(data) or "none"
        raise InputError(f"{what} with the keys {', '.join(known)} (needed: {', '.join(needed)}), received {received}")


def _require_version(what: str, data: Mapping[str, Any]) -> None:
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(f"expected {what} of schema_version={SCHEMA_VERSION}, received schema_version={version!r}")


def _json_object(text: str | bytes) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f"expected a recipe in JSON, received text that is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"expected a recipe as a JSON object, received a {type(data).__name__}")
    return data
