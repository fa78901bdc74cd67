r"""The gates with which Switchable Normalization starts in place of a BatchNorm.

An instance gate w takes the share w of each sample's own channel means away, at every layer again: after L layers
:math:`(1-w)^L` of them are left. So those of a deep network start smaller (`LOST`). A layer gate mixes the spread of a
whole sample into each channel, which costs most where the channels' variances are unlike (`layer_spread`); it starts
where that stays below `SHIFT`. Both stay above a thousandth, so that the gradient of a gate, :math:`w(1-w)` of that of
its statistic, does as well.
"""

from dataclasses import replace

import numpy as np

from .state import Array, BatchNormState
from .targets import SwitchNorm

CLOSED_GATE = -120.0
"""A logit whose softmax beside 0 underflows to exactly 0 in float32: the gate of a statistic not used at all."""

LEAST, MOST = 0.002, 0.05
"""The least gate that still learns, and the largest that a sample's statistics start with."""

LOST = 0.25
"""How much of a sample's channel means all the instance gates of a network together may take."""

SHIFT = 0.02
"""How much of a layer's output its layer gate may change at the start."""

SPREAD_OF_SAMPLES = 0.42
"""τ: how far a channel's mean in one sample is from its running mean, in running deviations."""

SHARED = 0.1
"""ρ: the share of that which all channels have in common, and which no group averages away."""


def start_gates(target: SwitchNorm) -> Array:
    """Return SN's starting gates, which sum to 1: (instance, layer, batch), or (instance, layer) without batch.

    ``"warm"`` gates are those of a network of a few layers, unless `warm_gates` has chosen them for ``target``.
    """
    if target.gates is not None:
        return np.array(target.gates)
    without = target.batch_statistics == "none"
    if target.start == "even":
        return np.full(2, 1 / 2) if without else np.full(3, 1 / 3)
    if target.start == "exact":
        return np.array([0.0, 1.0] if without else [0.0, 0.0, 1.0])
    return np.array(_warm(without, 1, None))


def warm_gates(target: SwitchNorm, depth: int, state: BatchNormState | None) -> SwitchNorm:
    """Return a warm ``target`` with its gates for a network of ``depth`` such layers; others as they are.

    ``state`` is the BatchNorm it replaces; None where the layer in front takes care of unlike channels.
    """
    if target.start != "warm" or target.gates is not None or target.compat is not None:
        return target
    return replace(target, gates=_warm(target.batch_statistics == "none", depth, state))


def _warm(without: bool, depth: int, state: BatchNormState | None) -> tuple[float, ...]:
    instance = min(MOST, max(LEAST, LOST / depth))
    if without:
        return instance, 1 - instance
    spread = None if state is None else layer_spread(state, 1)
    layer = min(MOST, max(LEAST, SHIFT / spread)) if spread else MOST
    return instance, layer, 1 - instance - layer


def layer_spread(state: BatchNormState, groups: int) -> float | None:
    r"""Return the expected change of the output, as a share of its root mean square, if groups gave all statistics.

    A group's mean is over S channels, which vary from sample to sample together in part (`SHARED`) and in part each by
    itself, the more the larger their variance v:

    .. math:: d^2 = \tau^2\, \frac{\sum_c \gamma_c^2 \left(\rho + \frac{1-\rho}{S}\right) \mathrm{mean}_S(v) / v_c}
                                  {\sum_c \gamma_c^2 + \beta_c^2}

    None where there are no running statistics, or none that a variance can be.
    """
    if state.mean is None or state.var is None:
        return None
    var, weights = state.var + state.eps, np.square(state.gamma)
    if not np.all(var > 0):
        return None
    scale = float(np.sum(weights) + np.sum(np.square(state.beta)))
    if scale == 0:
        return 0.0
    size = var.size // groups
    per_group: Array = (weights / var).reshape(groups, size).sum(axis=1) * var.reshape(groups, size).mean(axis=1)
    return float(SPREAD_OF_SAMPLES * np.sqrt((SHARED + (1 - SHARED) / size) * per_group.sum() / scale))


def gate_logits(gates: Array) -> Array:
    """Return logits whose softmax is ``gates``; a gate of 0 gets `CLOSED_GATE` below the largest."""
    with np.errstate(divide="ignore"):
        logits: Array = np.log(gates / gates.max())
    return np.maximum(logits, CLOSED_GATE)


def softmax(logits: Array) -> Array:
    """Return the gates for ``logits``."""
    exponentials: Array = np.exp(logits - logits.max())
    gates: Array = exponentials / exponentials.sum()
    return gates
