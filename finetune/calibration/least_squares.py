"""What calibration accumulates over a stream of inputs, in float64: moments, and a least-squares fit."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RIDGE = 0.1
"""Weight of the distance to the given weights, as a share of the inputs' mean square; see docs/design.md."""

WIDEST = 8192
"""The most inputs per output, bias included, of a layer that is refitted: their square is held in float64."""


class Moments:
    """Mean and biased variance per channel of a stream of arrays (..., C), in float64 (Chan et al., 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Array = np.zeros(())
        self.var: Array = np.zeros(())

    def add(self, values: NDArray[Any]) -> None:
        """Take in one array with the channels last."""
        rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
        mean = rows.mean(axis=0)
        self.merge(len(rows), mean, np.square(rows - mean).mean(axis=0))

    def merge(self, count: int, mean: Array, var: Array) -> None:
        """Take in ``count`` values per channel of this mean and biased variance."""
        share = count / (self.count + count)
        difference = mean - self.mean
        self.var = self.var + share * (var - self.var) + share * (1 - share) * difference**2
        self.mean = self.mean + share * difference
        self.count += count

    @property
    def deviation(self) -> Array:
        """The standard deviation per channel."""
        return np.sqrt(self.var)


class LinearFit:
    r"""The linear map nearest to a given one that takes a stream of inputs x to outputs y.

    .. math:: \min_D \sum \lVert r - D^T x \rVert^2 + \lambda\,\overline{x^2}\,n\,\lVert D \rVert^2,
              \qquad r = y - W^T x

    D is the change of the map W, of shape (K + 1, O) with a row for each input; the last row is the bias, for an input
    that is 1, and is free of the ridge. Where a layer has no bias, its shift is left to the norm behind it. Only sums
    are held, so the stream may be of any length; products are taken in the arrays' own type.
    """

    def __init__(self, weights: Array) -> None:
        inputs, outputs = weights.shape
        self.weights, self.count = weights, 0
        self._inputs: Array = np.zeros((inputs, inputs))
        self._remainders: Array = np.zeros((inputs, outputs))
        self._squares = 0.0
        self._scale = Moments()

    def add(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Take in inputs (M, K + 1) and the outputs (M, O) wanted for them."""
        remainder = y - x @ self.weights.astype(x.dtype)
        self.count += len(x)
        self._inputs += x.T @ x
        self._remainders += x.T @ remainder
        self._squares += float(np.square(remainder).sum(dtype=np.float64))
        self._scale.add(y)

    def solve(self) -> tuple[Array, float, float]:
        """Return the fitted weights and the residual before and after, as shares of the outputs' deviation."""
        squares = np.diag(self._inputs)[:-1]
        strength = np.append(np.full(len(squares), RIDGE * max(squares.mean(), np.finfo(np.float64).tiny)), 0)
        change = np.linalg.solve(self._inputs + np.diag(strength), self._remainders)
        explained = 2 * np.sum(change * self._remainders) - np.sum(change * (self._inputs @ change))
        after = max(0.0, self._squares - float(explained))
        deviation = float(np.square(self._scale.deviation).sum()) * self.count
        shares = [float(np.sqrt(value / deviation)) if deviation > 0 else 0.0 for value in (self._squares, after)]
        return self.weights + change, shares[0], shares[1]
