"""What calibration accumulates over a stream of inputs, in float64: moments, and a least-squares fit."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...convert.state import Array

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

    D is the change of the map W, of shape (G, K + 1, O) for G groups of inputs and outputs, with a row for each input;
    the last row is the bias, for an input that is 1, and is free of the ridge. Where a layer has no bias, its shift is
    left to the norm behind it. Only sums are held, so the stream may be of any length; products are taken in the
    arrays' own type.
    """

    def __init__(self, weights: Array) -> None:
        groups, inputs, outputs = weights.shape
        self.weights = weights
        self._inputs: Array = np.zeros((groups, inputs, inputs))
        self._remainders: Array = np.zeros((groups, inputs, outputs))

    def add(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Take in inputs (G, M, K + 1) and the outputs (G, M, O) wanted for them."""
        remainder = (y - x @ self.weights.astype(x.dtype)).astype(x.dtype)
        transposed = x.transpose(0, 2, 1)
        self._inputs += transposed @ x
        self._remainders += transposed @ remainder

    def solve(self, ridge: float, step: float = 1.0) -> Array:
        """Return the weights ``step`` of the way from the given to the fitted ones.

        ``ridge`` is λ, the weight of the distance to the given weights as a share of the inputs' mean square.
        """
        squares = np.diagonal(self._inputs, axis1=1, axis2=2)
        weight = ridge * squares[:, :-1].mean(axis=1, keepdims=True)
        floor = np.maximum(1e-9 * squares[:, -1:], np.finfo(np.float64).tiny)
        strength = np.concatenate([np.broadcast_to(np.maximum(weight, floor), squares[:, :-1].shape), floor], axis=1)
        change = np.linalg.solve(self._inputs + strength[:, None] * np.eye(strength.shape[1]), self._remainders)
        return self.weights + step * change
