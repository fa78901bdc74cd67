"""How far Batch Renormalization may correct at a training step, as backend operations on the step."""

from typing import Any, Literal

from keras import ops

Schedule = Literal["paper", "pretrained", "sigmoid"]
_SIGMOID_START = 1e-3  # the sigmoid's d_max at step 0, since it cannot be 0


def limits_at(
    step: Any, schedule: Schedule, r_max: float, d_max: float, steps: int | None, t_delta: float
) -> tuple[Any, Any]:
    """Return the limits at ``step``, from 1 and 0 up to ``r_max`` and ``d_max``.

    ``"paper"``: plain BatchNorm for the first 4 % of ``steps``, then linear, until 31 % and 19 % (Ioffe, "Batch
    Renormalization", section 4.1: steps 5,000, 40,000 and 25,000 of 130,000). ``"pretrained"``: linear all along.
    ``"sigmoid"``: logistic in t = ``t_delta`` · step, r_max / (1 + (r_max - 1) e^-t) and d_max / (1 +
    (d_max / 0.001 - 1) e^-2t).
    """
    if schedule == "sigmoid":
        t = step * t_delta
        r = r_max / (1 + (r_max - 1) * ops.exp(-t))
        d = d_max / (1 + (d_max / _SIGMOID_START - 1) * ops.exp(-2 * t)) if d_max else ops.zeros_like(t)
        return r, d
    assert steps is not None
    progress = step / steps
    begin, r_end, d_end = (0.04, 0.31, 0.19) if schedule == "paper" else (0.0, 1.0, 1.0)
    return 1 + (r_max - 1) * _ramp(progress, begin, r_end), d_max * _ramp(progress, begin, d_end)


def _ramp(x: Any, start: float, end: float) -> Any:
    return ops.clip((x - start) / (end - start), 0, 1)
