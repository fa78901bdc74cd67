r"""The way back: the BatchNorm that computes a norm's output from its input as nearly as a line does.

Per channel, over all positions of all inputs, let :math:`\mu, v` be the mean and variance of a norm's input x,
:math:`\bar y, u` those of its output y, and r the correlation of the two. The line is

.. math:: y \approx \bar y + s (x - \mu), \qquad s = \mathrm{sign}(r) \min(1, 2|r|) \sqrt{u / v}

and the BatchNorm with running statistics :math:`\mu, v`, :math:`\gamma = s\sqrt{v+\epsilon}` and
:math:`\beta = \bar y` computes exactly that. The slope of least squares, :math:`r\sqrt{u/v}`, is nearer to one
layer's output and further from the model's: each layer hands on a smaller deviation than it was given (docs/design.md
has the figures). So the line keeps the deviation, as far as it is then nearer to y than the constant :math:`\bar y` is:
the mean square of the distance is :math:`u(1 - 2k|r| + k^2)` with the share :math:`k = \min(1, 2|r|)`.

Everything here is float64 NumPy with arrays of shape (C,).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .state import Array, BatchNormState

CONSTANT = 1e-12
"""Share of its mean square below which the variance of a float32 stream is rounding: its channel is constant."""


class LineFit:
    """What the line through a stream of inputs x and outputs y needs: two means, two variances, a covariance a channel.

    They are merged from part to part about the parts' means (Chan et al., 1979), so that the stream may be of any
    length and its mean far above its deviation.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Array = np.zeros((2, 1))
        self.moments: Array = np.zeros((3, 1))  # biased: of x, of y, and of both

    def add(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Take in one part, both arrays (..., C)."""
        rows = np.stack([part.reshape(-1, part.shape[-1]).astype(np.float64) for part in (x, y)])
        mean = rows.mean(axis=1)
        a, b = rows - mean[:, None]
        moments = np.stack([np.einsum("nc,nc->c", *pair) for pair in ((a, a), (b, b), (a, b))]) / rows.shape[1]
        share = rows.shape[1] / (self.count + rows.shape[1])
        apart = mean - self.mean
        between = np.stack([apart[0] ** 2, apart[1] ** 2, apart[0] * apart[1]])
        self.moments = self.moments + share * (moments - self.moments) + share * (1 - share) * between
        self.mean = self.mean + share * apart
        self.count += rows.shape[1]

    def line(self) -> "Line":
        """Return the line; that of a channel whose input or output is constant has no slope."""
        var, out, both = self.moments
        varies = (var > CONSTANT * np.square(self.mean[0])) & (out > 0)
        ratio = np.sqrt(np.where(varies, out, 0.0) / np.where(varies, var, 1.0))
        correlation = np.clip(both / np.sqrt(np.where(varies, var * out, np.inf)), -1.0, 1.0)
        kept = np.minimum(1.0, 2.0 * np.abs(correlation))
        left = out * (1.0 - 2.0 * kept * np.abs(correlation) + np.square(kept))
        return Line(np.sign(correlation) * kept * ratio, self.mean[0], var, self.mean[1], out, left)

    @property
    def is_finite(self) -> bool:
        """Whether all that was taken in is finite."""
        return bool(np.isfinite(self.mean).all() and np.isfinite(self.moments).all())

    @property
    def is_constant(self) -> bool:
        """Whether the input was constant in every channel."""
        return not np.any(self.moments[0] > CONSTANT * np.square(self.mean[0]))


@dataclass(frozen=True)
class Line:
    """A line for each channel: y = ``level`` + ``slope`` (x - ``mean``), and what it leaves.

    ``var`` is the variance of x, ``out`` that of y, and ``left`` the mean square of y's distance from the line.
    """

    slope: Array
    mean: Array
    var: Array
    level: Array
    out: Array
    left: Array

    @property
    def drop(self) -> float:
        """The share of the output's deviation, over all channels, that the line does not explain."""
        out = float(self.out.sum())
        return float(np.sqrt(self.left.sum() / out)) if out > 0 else 0.0

    def batch_norm(self, eps: float) -> BatchNormState:
        """Return the BatchNorm that computes the line."""
        return BatchNormState(self.slope * np.sqrt(self.var + eps), self.level, self.mean, self.var, eps)
