"""What a replacement is expected to cost, before anything is touched: the drift of its output.

After the carry-over a replacement differs from the BatchNorm only as far as a sample's statistics differ from the
expected ones, of which `layer_spread` has the formula. docs/design.md says how well it predicts.
"""

from math import isfinite, prod

from .gates import layer_spread, start_gates
from .state import Array, BatchNormState
from .targets import BatchNorm, BatchRenorm, SwitchNorm, Target


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
    instance, layer = layer_spread(state, state.gamma.size), layer_spread(state, 1)
    if instance is None or layer is None:
        return None
    if isinstance(target, SwitchNorm):
        drift: float | None = _of_gates(start_gates(target), spatial, instance=instance, layer=layer)
    elif groups is None:
        raise ValueError("expected `groups` for a GroupNorm target, received groups=None")
    else:
        drift = layer_spread(state, groups)
    return drift if drift is not None and isfinite(drift) else None


def folds(target: Target) -> bool:
    """Return whether ``target`` becomes a BatchNorm in an exported file, to be folded into a linear layer before it."""
    if isinstance(target, SwitchNorm):
        return target.start == "exact" and target.batch_statistics != "none"
    return isinstance(target, BatchRenorm | BatchNorm)


def _of_gates(gates: Array, spatial: tuple[int, ...] | None, *, instance: float, layer: float) -> float:
    if spatial == ():  # (N, C) input has the layer's statistics for an instance's
        instance = layer
    elif spatial is not None and prod(spatial) == 1:  # exact: the mean is the value, and the carry-over knows
        instance = 0.0
    return float(gates[0] * instance + gates[1] * layer)
