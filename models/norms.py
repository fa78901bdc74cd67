"""Which norms a network can be asked for by name, and how many groups they have."""

from collections.abc import Callable
from math import gcd
from typing import Any, TypeAlias

Norm: TypeAlias = str | Callable[[int], Any]
"""A norm by its name, or a function that returns a layer for a number of channels."""

NAMES = ("bn", "sn", "brn", "gn", "ln", "in")


def groups_of(norm: str, channels: int, groups: int) -> int:
    """Return the groups of "gn" (``groups``, or as many of them as divide the channels), of "ln" (1) and of "in"."""
    return {"gn": gcd(groups, channels), "ln": 1, "in": channels}[norm]


def require_known(norm: Any) -> None:
    """Raise `ValueError` unless ``norm`` is one of `NAMES`."""
    if norm not in NAMES:
        raise ValueError(
            f"expected `norm` out of {', '.join(NAMES)}, or a function that returns a layer for a number of channels, "
            f"received norm={norm!r}"
        )


def blocks_of(depth: Any) -> int:
    """Return how many blocks each of a wide ResNet's three stages has; raises `ValueError` if none has that depth."""
    if not isinstance(depth, int) or depth < 10 or (depth - 4) % 6:
        raise ValueError(f"expected `depth` as 6 n + 4, 10 or more, received depth={depth!r}")
    return (depth - 4) // 6
