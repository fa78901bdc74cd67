r"""The carry-over: a replacement's parameters from those of a trained BatchNorm, without data.

A BatchNorm at inference computes, per channel, :math:`y = \gamma (x-\mu)/\sqrt{v+\epsilon} + \beta`. A
replacement normalises by other statistics. Let :math:`\hat m, \hat v` be what those statistics are *expected* to
be, given the running :math:`\mu, v`. Then

.. math:: \gamma' = \gamma \sqrt{\hat v+\epsilon} / \sqrt{v+\epsilon}, \qquad
          \beta' = \beta + \gamma (\hat m-\mu) / \sqrt{v+\epsilon}

make the replacement equal the BatchNorm whenever a sample's statistics are as expected. A GroupNorm, which has none
but a sample's, keeps the share `SPREAD` of that scale. Everything here is float64 NumPy with arrays of shape (C,); both
frameworks' patchers call it and both frameworks' tests use it as their oracle.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from ..errors import InputError
from .gates import gate_logits, start_gates
from .state import Array, BatchNormState
from .targets import BatchNorm, BatchRenorm, GroupNorm, SwitchNorm, Target

SPREAD = 0.95
"""Share of a GroupNorm's carried-over scale that is kept, because a sample's statistics spread around the expected.

Dividing by each sample's own deviation gives every sample the same one, so the slope of least error is below the ratio
of deviations. How far cannot be known from running statistics; see docs/design.md for how this was measured.
"""


@dataclass(frozen=True)
class Carried:
    """A replacement's parameters: affine of shape (C,), and SN's gate logits of shape (3,) or (2,)."""

    gamma: Array
    beta: Array
    gate_logits: Array | None = None


def group_moments(mean: Array, var: Array, groups: int) -> tuple[Array, Array]:
    r"""Return the expected mean and variance of each channel's group, expanded to (C,).

    .. math:: \hat m = \mathrm{mean}_S(\mu), \qquad \hat v = \mathrm{mean}_S(v) + \mathrm{var}_S(\mu)
    """
    size = mean.size // groups
    means = mean.reshape(groups, size)
    group_mean = means.sum(axis=1, keepdims=True) / size
    group_var = (var.reshape(groups, size) + (means - group_mean) ** 2).sum(axis=1) / size
    return group_mean.repeat(size), group_var.repeat(size)


def carry_over(
    state: BatchNormState,
    target: Target,
    *,
    groups: int | None = None,
    spatial: tuple[int, ...] | None = None,
    gates: Array | None = None,
) -> Carried:
    r"""Return the parameters that make ``target`` start as close to the BatchNorm as its statistics allow.

    ``groups`` is the resolved number of groups of a GroupNorm. ``spatial`` is the shape behind the channels where
    known: () for (N, C) input, whose instance statistics SN takes to be the layer's; where it holds a single
    value (1x1 maps) the instance mean is that value itself and the instance variance 0, so that an instance gate
    w scales the signal by 1-w, which is undone here.

    ``gates`` are SN's, those of `start_gates` unless given.

    A state without running statistics is copied: nothing is known of what to expect. γ = 0 stays 0.
    Raises `InputError` if the state is not finite or a variance is negative.
    """
    if problems := state.problems():
        raise InputError(f"expected finite parameters and variances >= 0, received {'; '.join(problems)}")
    if isinstance(target, SwitchNorm) and gates is None:
        gates = start_gates(target)
    logits = None if gates is None else gate_logits(gates)
    if state.mean is None or state.var is None or isinstance(target, BatchRenorm | BatchNorm):
        return Carried(state.gamma, state.beta, logits)

    keep = 1.0
    if isinstance(target, GroupNorm):
        if groups is None:
            raise ValueError("expected `groups` for a GroupNorm target, received groups=None")
        mean, var = group_moments(state.mean, state.var, groups)
    else:
        assert gates is not None
        layer = group_moments(state.mean, state.var, 1)
        own: tuple[Array | float, Array | float] = (state.mean, state.var)
        if spatial == ():
            own = layer
        elif spatial is not None and prod(spatial) == 1:
            own, keep = (0.0, 0.0), 1 - gates[0]
        mean = gates[0] * own[0] + gates[1] * layer[0]
        var = gates[0] * own[1] + gates[1] * layer[1]
        if gates.size == 3:
            mean, var = mean + gates[2] * state.mean, var + gates[2] * state.var

    deviation = np.sqrt(state.var + state.eps)
    share = SPREAD if isinstance(target, GroupNorm) else 1.0
    gamma = state.gamma * (share * np.sqrt(var + state.eps) / (deviation * keep))
    beta = state.beta + state.gamma * (mean / keep - state.mean) / deviation
    return Carried(gamma, beta, logits)
