"""The scores in what a network returns."""

import math
from collections.abc import Mapping
from typing import Any

from ...errors import UnsupportedError, option

_LEAST_PROBABILITY = 1e-30
_SUM_TOLERANCE = 1e-3


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


def logits(scores: Any, xp: Any, axis: int = -1) -> Any:
    """Return logits for scores that may be probabilities, in NumPy, torch or `keras.ops`, given as ``xp``.

    The logarithm of a softmax is its logits but for a constant, which neither loss nor temperature sees.
    """
    whole = xp.all(xp.abs(xp.sum(scores, axis) - 1) < _SUM_TOLERANCE)
    shares = xp.logical_and(xp.all(scores >= 0), whole)
    return xp.where(shares, xp.log(xp.clip(scores, _LEAST_PROBABILITY, math.inf)), scores)
