r"""What is known of samples at a BatchNorm: each one's first two moments, and what they are taken to be without data.

With :math:`\hat x = (x-\mu)/\sqrt{v+\epsilon}`, what the BatchNorm normalizes to, a sample s and a channel c have
:math:`M_1 = E_p[\hat x]` and :math:`M_2 = E_p[\hat x^2]` over the positions p of a map. What any norm by a sample's
statistics does to the channel follows from these two exactly, so N·C numbers of each are all that is kept of N inputs.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from .state import Array

TAU = 0.4
"""τ: how far a channel's mean in one sample is from its running mean, in running deviations."""

KAPPA = 0.4
"""κ: the deviation of the logarithm of a channel's variance in one sample."""

RHO = 0.5
"""ρ: the share of that which all channels have in common, as the contrast of an image."""

COMMON = (0.0, 3.0)
"""How much all inputs of a layer vary together, beside each by itself: for one half of the samples, and the other."""

IMAGINED = 256
"""How many samples are imagined."""


@dataclass(frozen=True)
class Samples:
    """The mean and the mean square of each sample's normalized input to a BatchNorm, each of shape (N, C)."""

    mean: Array
    square: Array

    def __len__(self) -> int:
        return len(self.mean)

    def split(self) -> tuple["Samples", "Samples"]:
        """Return the samples to fit to and the last ones, `kept_aside`, which judge what those have chosen."""
        first = len(self) - kept_aside(len(self))
        return Samples(self.mean[:first], self.square[:first]), Samples(self.mean[first:], self.square[first:])


def kept_aside(count: int) -> int:
    """Return how many of so many samples, the last ones, nothing is fitted to: an eighth, one at least."""
    return max(1, count // 8)


def imagine(gain: Array, spatial: tuple[int, ...] | None) -> Samples:
    r"""Return samples as they might be, without data: what the layer in front can do, and how images usually vary.

    ``gain`` (C, K) is what a constant in each of the K inputs of the layer in front adds to each of its C outputs: the
    sums of its kernels. A sample's means are then those of its inputs through the gains, so that channels which read
    alike vary alike. In half of the samples inputs vary each by itself, in the others most of all together:

    .. math:: M_1 = \tau\,\mathrm{unit}(G h), \qquad M_2 = M_1^2 + (1-\tau^2)\,e^{\kappa n - \kappa^2/2}

    with h, n Gaussian, n with the share ρ common to all channels. Maps of a single value (``spatial`` (), or 1x1) have
    no variance of their own and all of it between samples. The samples are the same at every call.
    """
    random = np.random.default_rng(0)
    channels, inputs = gain.shape
    single = spatial is not None and prod(spatial) == 1
    tau = 1.0 if single else TAU
    means = []
    for common in COMMON:
        size = IMAGINED // len(COMMON)
        constants = random.normal(size=(size, inputs)) + common * random.normal(size=(size, 1))
        deviation = np.sqrt(np.square(gain).sum(axis=1) + np.square(common * gain.sum(axis=1)))
        means.append(tau * (constants @ gain.T) / np.where(deviation > 0, deviation, 1.0))
    mean = np.concatenate(means)
    if single:
        return Samples(mean, np.square(mean))
    contrast = np.sqrt(RHO) * random.normal(size=(IMAGINED, 1))
    contrast = contrast + np.sqrt(1 - RHO) * random.normal(size=(IMAGINED, channels))
    return Samples(mean, np.square(mean) + (1 - tau**2) * np.exp(KAPPA * contrast - KAPPA**2 / 2))
