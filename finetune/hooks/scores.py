"""The scores in what a network returns, and the logits in those."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedError, option

_LEAST_PROBABILITY = 1e-30
_SUM_TOLERANCE = 2.0**-7
"""How far the sum of probabilities may be from 1: those in bfloat16 have 8 binary digits each."""


def scores(output: Any) -> Any:
    """Return the scores in a model's output: all of it, ``"logits"`` of a mapping, or the first of several outputs.

    Raises `UnsupportedError` if there are none.
    """
    found, kind = output, f"a {type(output).__name__}"
    if isinstance(output, Mapping):
        found, kind = output.get("logits"), f"a mapping of {', '.join(map(str, output))}"
    elif isinstance(output, tuple | list):
        found = output[0] if output else None
    if not hasattr(found, "shape"):
        raise UnsupportedError(
            f'expected a model that returns scores, alone, as "logits" of a mapping or first of several outputs, '
            f"received one that returns {kind}"
        )
    return found


def class_count(scores: Any) -> int:
    """Return the number of classes that have a score.

    Raises `UnsupportedError` for scores that are not of shape (N, classes), which labels of images need.
    """
    if len(scores.shape) != 2:
        raise UnsupportedError(
            "expected a model with scores of shape (N, classes) for labels of images, received one with scores of "
            f"shape {tuple(scores.shape)}; {option('teacher', 'original')} needs no labels"
        )
    return int(scores.shape[1])


class Logits:
    """Makes logits of one model's scores, which may be probabilities: whether they are is decided once.

    `decide` does so by the values of the first scores it is given. Code that is traced for a graph has none to read:
    called there undecided, it looks at each batch by itself.
    """

    def __init__(self) -> None:
        self.probabilities: bool | None = None

    def decide(self, scores: NDArray[Any], axis: int = -1) -> None:
        """Decide by these scores, unless that is done; ``axis`` holds the classes."""
        if self.probabilities is None:
            self.probabilities = bool(_are_probabilities(scores, np, axis))

    def __call__(self, scores: Any, xp: Any, axis: int = -1) -> Any:
        """Return the logits of scores in NumPy, torch or `keras.ops`, given as ``xp``.

        The logarithm of a softmax is its logits but for a constant, which neither loss nor temperature sees.
        """
        if self.probabilities is False:
            return scores
        found = xp.log(xp.clip(scores, _LEAST_PROBABILITY, math.inf))
        return found if self.probabilities else xp.where(_are_probabilities(scores, xp, axis), found, scores)


def _are_probabilities(scores: Any, xp: Any, axis: int) -> Any:
    whole = xp.all(xp.abs(xp.sum(scores, axis) - 1) < _SUM_TOLERANCE)
    return xp.logical_and(xp.all(scores >= 0), whole)
