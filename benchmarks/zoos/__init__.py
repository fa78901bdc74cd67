"""The networks that `zoo.py` sweeps, a file a library: ``networks()`` maps a name to what builds it, untrained.

A builder returns a `Network`. Libraries are imported where a builder runs, so that one that is missing fails the
networks of its own alone.
"""

import functools
import importlib
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from normswap import Inputs

LIBRARIES = (
    "torchvision",
    "transformers",
    "segmentation",
    "monai",
    "ultralytics",
    "video_and_audio",
    "graphs_and_points",
    "vision",
    "keras_applications",
    "keras_hub",
    "keras_others",
)


class Network(NamedTuple):
    """A model, and the arguments of a call of it with a batch of two."""

    model: Any
    example: Inputs


def networks(library: str) -> Mapping[str, Callable[[], Network]]:
    """Return the builders of one library's networks by their names."""
    return importlib.import_module(f"zoos.{library}").networks()


def each(names: str, build: Callable[[str], Network]) -> dict[str, Callable[[], Network]]:
    """Return a builder for each of the names that are parted by blanks."""
    return {name: functools.partial(build, name) for name in names.split()}


def of(place: str, x: Any, *args: Any, **options: Any) -> Callable[[], Network]:
    """Return what builds ``place``, spelled module:name, with these arguments; it is called on the example ``x``."""
    module, _, name = place.partition(":")

    def build() -> Network:
        found = operator.attrgetter(name)(importlib.import_module(module))
        return Network(found(*args, **options), Inputs.of(x))

    return build
