"""One normalization at inference, whatever its kind and framework: what a file needs to know of it.

Every kind is one formula, with gates w and w′ over the statistics of an instance, of a layer (or of a group) and of
the batches seen in training:

    y = γ (x - Σ w_k μ_k) / √(Σ w′_k σ²_k + ε) + β

BatchNorm and Batch Renormalization have the gates (0, 0, 1), Group Normalization (0, 1, 0), Switchable Normalization
its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Gates = tuple[float, float, float]

STATISTICS = ("instance", "layer", "batch")
BATCH: Gates = (0.0, 0.0, 1.0)
INSTANCE: Gates = (1.0, 0.0, 0.0)
LAYER: Gates = (0.0, 1.0, 0.0)

SAFE = 4.0
"""Largest `Norm.amplification` at which E[x²] - E[x]² is good: outputs err by up to 2.4e-6 of scale, at 16 by 1e-5."""


@dataclass(frozen=True)
class Norm:
    """One call of a normalization layer: ``gamma``, ``beta``, ``mean`` and ``var`` are (C,), ``spatial`` its map.

    ``gates`` are those of the mean and of the variance in the order instance, layer, batch. A layer's statistics are
    taken over each of ``groups`` groups of channels. ``mean`` and ``var`` are the running statistics, None in a layer
    that has none; ``seen`` is then the largest mean²/variance of a group seen on the example, None if unknown.
    An ``unbiased`` norm, which is switchablenorms', divides squares by one less than there are: in a map over its
    values, of which the layer's variance is mixed, and without one over the channels.
    """

    name: str
    spatial: tuple[int | None, ...]
    gamma: Array
    beta: Array
    eps: float
    gates: tuple[Gates, Gates]
    mean: Array | None = None
    var: Array | None = None
    groups: int = 1
    seen: float | None = None
    unbiased: bool = False

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return len(self.gamma)

    @property
    def sizes(self) -> list[int]:
        """The map's sizes, -1 where open."""
        return [-1 if size is None else size for size in self.spatial]

    @property
    def values(self) -> int | None:
        """How many values a sample has per channel, None where the map's size is open."""
        return None if None in self.spatial else math.prod(self.sizes)

    def amplification(self) -> float:
        r"""Return how many times its own rounding the variance errs by if computed as E[x²] - E[x]².

        It is the largest over the channels of Σ w′_k m²_k / (Σ w′_k σ²_k + ε), k over the statistics taken from the
        sample and m² what their means square to: what cancels over what is left. Infinite where nothing is known.
        """
        instance, layer, batch = self.gates[1]
        if self.mean is None or self.var is None:
            return float("inf") if self.seen is None else self.seen
        means, variances = (part.reshape(self.groups, -1) for part in (self.mean, self.var))
        group_mean = means.mean(1, keepdims=True)
        between = ((means - group_mean) ** 2).mean(1, keepdims=True)
        group_var = variances.mean(1, keepdims=True) + between
        cancelled = instance * means**2 + layer * (means**2).mean(1, keepdims=True)
        left = instance * variances + layer * group_var + batch * variances + self.eps
        return float((cancelled / left).max())

    def call(self, shape: Sequence[Any], earlier: Sequence["Norm"]) -> "Norm":
        """Return the norm as called on (N, C, ...) of ``shape``, named "#2" where ``earlier`` calls have one of it."""
        number = 1 + sum(other.gamma is self.gamma for other in earlier)
        spatial = tuple(size if isinstance(size, int) else None for size in shape[2:])
        return replace(self, name=self.name if number == 1 else f"{self.name}#{number}", spatial=spatial)

    def reduced(self) -> "Norm":
        """Return the same norm with gates only over what differs in its map.

        A map without spatial axes has one value per channel, for which the layers take the layer's statistics as the
        instance's; where every channel is a group of its own, the layer's statistics are the instance's.
        """
        if not self.spatial:
            return replace(self, gates=_moved(self.gates, 0, 1))
        return replace(self, gates=_moved(self.gates, 1, 0), groups=1) if self.groups == self.channels else self


def amplification_of(x: Array, groups: int, eps: float) -> float:
    """Return the largest E[m²]/(σ²+ε) of a sample's groups, m the means of its channels; ``x`` is (N, C, ...)."""
    grouped = x.reshape(len(x), groups, x.shape[1] // groups, -1)
    squared = np.square(grouped.mean(3)).mean(2)
    return float((squared / (grouped.var((2, 3)) + eps)).max())


def three(gates: Sequence[float]) -> Gates:
    """Return gates over instance, layer and, closed where a layer has none, batch."""
    instance, layer, batch = [*gates, 0.0][:3]
    return instance, layer, batch


def _moved(gates: tuple[Gates, Gates], source: int, target: int) -> tuple[Gates, Gates]:
    def move(each: Gates) -> Any:
        found = list(each)
        found[target] += found[source]
        found[source] = 0.0
        return tuple(found)

    return move(gates[0]), move(gates[1])
