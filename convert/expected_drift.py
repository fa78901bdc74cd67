r"""What a replacement is expected to cost, before anything is touched: the drift of its output.

After the carry-over a replacement differs from the BatchNorm only as far as a sample's statistics differ from the
expected ones. A group's mean is over S channels, which vary from sample to sample together in part (`SHARED`) and in
part each by itself, the more the larger their variance v:

.. math:: d^2 = \tau^2\, \frac{\sum_c \gamma_c^2 \left(\rho + \frac{1-\rho}{S}\right) \mathrm{mean}_S(v) / v_c}
                              {\sum_c \gamma_c^2 + \beta_c^2}

is the expected share of the layer's own root mean square output that changes. docs/design.md says how well it predicts.
"""

from math import isfinite, prod, sqrt

import numpy as np

from .carry_over import Array, BatchNormState, start_gates
from .targets import BatchNorm, BatchRenorm, SwitchNorm, Target

SPREAD_OF_SAMPLES = 0.42
"""τ: how far a channel's mean in one sample is from its running mean, in running deviations."""

SHARED = 0.1
"""ρ: the share of that which all channels have in common, and which no group averages away."""


def expected_drift(
    state: BatchNormState, target: Target, *, groups: int | None = None, spatial: tuple[int, ...] | None = None
) -> float | None:
    """Return the expected root mean square change of a site's output, as a share of the output's own.

    The arguments are those of `carry_over`. BatchRenorm changes nothing at inference. SwitchNorm changes as much as
    its gates take of a sample's statistics. None where there are no running statistics, or none that a variance can be.
    """
    if isinstance(target, BatchRenorm | BatchNorm):
        return 0.0
    if state.mean is None or state.var is None:
        return None
    var, weights = state.var + state.eps, np.square(state.gamma)
    if not np.all(var > 0):
        return None
    scale = float(np.sum(weights) + np.sum(np.square(state.beta)))
    if scale == 0:
        return 0.0

    def of_groups(count: int) -> float:
        size = var.size // count
        per_group: Array = (weights / var).reshape(count, size).sum(axis=1) * var.reshape(count, size).mean(axis=1)
        return SPREAD_OF_SAMPLES * sqrt((SHARED + (1 - SHARED) / size) * float(per_group.sum()) / scale)

    if isinstance(target, SwitchNorm):
        drift = _of_gates(target, spatial, instance=of_groups(var.size), layer=of_groups(1))
    elif groups is None:
        raise ValueError("expected `groups` for a GroupNorm target, received groups=None")
    else:
        drift = of_groups(groups)
    return drift if isfinite(drift) else None


def folds(target: Target) -> bool:
    """Return whether ``target`` becomes a BatchNorm in an exported file, to be folded into a linear layer before it."""
    if isinstance(target, SwitchNorm):
        return target.start == "exact" and target.batch_statistics != "none"
    return isinstance(target, BatchRenorm | BatchNorm)


def _of_gates(target: SwitchNorm, spatial: tuple[int, ...] | None, *, instance: float, layer: float) -> float:
    gates = start_gates(target)
    if spatial == ():  # (N, C) input has the layer's statistics for an instance's
        instance = layer
    elif spatial is not None and prod(spatial) == 1:  # exact: the mean is the value, and the carry-over knows
        instance = 0.0
    return float(gates[0] * instance + gates[1] * layer)
