"""Figures that say how a fine-tuning goes: gates, how often BRN is clipped, drift from the original."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .contract import Gates, RenormStatistics, readings_of
from .training import Array


def gates(model: Any) -> Gates:
    """Return the gates of every Switchable Normalization: by name, those of the mean and those of the variance.

    Each is of shape (3,) in the order instance, layer, batch, or (2,) without batch statistics, and sums to 1. Layers
    come in the order in which the model holds them.
    """
    return readings_of(model).gates(model)


def drift(student: Array, teacher: Array) -> float:
    r"""Return how far the logits (N, K) of two models are apart, as a share of the teacher's.

    .. math:: \mathrm{rms}(s - t) / \mathrm{rms}(t)

    with the mean over its K classes taken from each sample's logits, since a softmax does not see that. Two models that
    are equal have 0, even if the teacher's logits are constant.
    """
    wanted = _centred(teacher)
    difference = float(np.square(_centred(student) - wanted).mean())
    if difference == 0:
        return 0.0
    scale = float(np.square(wanted).mean())
    return float(np.sqrt(difference / scale)) if scale else float("inf")


class Clipping:
    r"""Tells which share of the channels the limits of Batch Renormalization clip, in either framework.

    A training pass moves the running μ and σ by a share m of the batch's distance from them, so what it saw follows
    from what it left, and the pass itself bears no cost:

    .. math:: \sigma_B/\sigma = 1 + (\sigma'/\sigma - 1)/m, \qquad (\mu_B - \mu)/\sigma = (\mu' - \mu)/(m \sigma)

    `on_step` belongs before the step, `share` after it and before anything else moves the statistics. Where a step has
    several ``passes``, it tells of the average of their batches.
    """

    def __init__(self, model: Any, passes: int = 1) -> None:
        self._statistics = readings_of(model).renorm_statistics(model)
        self._passes = passes
        self._before: RenormStatistics | None = None

    def on_step(self, step: int) -> None:
        """Keep the running statistics from before ``step``."""
        self._before = self._statistics()

    def share(self) -> float | None:
        """Return the share of channels whose r or d was clipped; None if no Batch Renormalization was in training."""
        before, after = self._before, self._statistics()
        if before is None or after is None:
            return None
        mean, sigma = after.mean - before.mean, after.sigma - before.sigma
        moved = np.bincount(after.layer, weights=(mean != 0) | (sigma != 0))[after.layer] > 0
        if not moved.any():
            return None
        distance = before.sigma * (1 - (1 - after.weight) ** self._passes)
        with np.errstate(all="ignore"):  # a layer that stood still may have no weight
            r, d = 1 + sigma / distance, mean / distance
            clipped = (r > after.r_max) | (r * after.r_max < 1) | (np.abs(d) > after.d_max)
        return float(clipped[moved].mean())


def _centred(logits: Array) -> NDArray[np.float64]:
    wide = np.asarray(logits, np.float64)
    centred: NDArray[np.float64] = wide - wide.mean(axis=-1, keepdims=True)
    return centred
