"""Schedules as plain functions of how far a run has come, so that a resumed run needs no more than its step."""

import numpy as np

from ...layers.limits import Limits, Schedule, default_limits, limits_at

SIGMOID_END = 10.0
"""Where the logistic curve has arrived: both limits are within 0.01 % of their last value."""


def renorm_limits(preset: Schedule, progress: float) -> Limits:
    """Return Batch Renormalization's (r_max, d_max) at ``progress`` (0 to 1) of a run.

    The curves are those the layers can follow by themselves (see `limits_at`), scaled to the run: ``"pretrained"``
    from 1 to 1.25 and 0 to 0.5; ``"paper"`` plain BatchNorm for the first 4 %, then r_max to 3 at 31 % and d_max to 5
    at 19 %; ``"sigmoid"`` to 3 and 5, with t from 0 to 10.
    """
    r_max, d_max = limits_at(np, progress, preset, *default_limits(preset), 1, SIGMOID_END)
    return float(r_max), float(d_max)
