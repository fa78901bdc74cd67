"""A plan's choices as a small JSON file, replayable on a fresh copy of the same model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .targets import Target, target_from_dict, target_to_dict

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Choice:
    """What one site becomes: its name, what it was, and its target with every default resolved.

    ``spatial`` is the shape behind the channels seen when the choice was made: () for (N, C) input, or None.
    """

    name: str
    source: str
    channels: int
    target: Target
    spatial: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Recipe:
    """The choices for every replaced site of one model, in the model's own order."""

    framework: str
    choices: tuple[Choice, ...]

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
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise InputError(
                f"expected a recipe of schema_version={SCHEMA_VERSION}, received schema_version={version!r}"
            )
        try:
            choices = tuple(
                Choice(
                    name=site["name"],
                    source=site["source"],
                    channels=int(site["channels"]),
                    spatial=None if site.get("spatial") is None else tuple(map(int, site["spatial"])),
                    target=target_from_dict(site["target"]),
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
    def from_json(cls, text: str) -> "Recipe":
        """Return the recipe in ``text``, which may be a larger object that holds one, such as a bundle's manifest.

        Raises `InputError` if there is none.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise InputError(f"expected a recipe in JSON, received text that is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise InputError(f"expected a recipe as a JSON object, received a {type(data).__name__}")
        return cls.from_dict(data["recipe"] if isinstance(data.get("recipe"), dict) else data)
