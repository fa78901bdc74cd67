"""How far Batch Renormalization may correct at a training step, for any array library."""

from types import ModuleType
from typing import Any, Literal, get_args

Schedule = Literal["paper", "pretrained", "sigmoid"]
Limits = tuple[float, float]

_PAPER_STEPS = 5_000, 40_000, 25_000
_PAPER_SHARES = 0.04, 0.31, 0.19  # of the 130,000 steps of the paper's run
SIGMOID_START = 1e-3
"""The sigmoid's d_max at step 0, since it cannot be 0."""


def limits_at(
    xp: ModuleType, step: Any, schedule: Schedule, r_max: float, d_max: float, steps: int | None, t_delta: float
) -> tuple[Any, Any]:
    """Return the limits at ``step``, an array of the library ``xp``, from 1 and 0 up to ``r_max`` and ``d_max``.

    ``"paper"``: plain BatchNorm up to step 5,000, then linear, until 40,000 and 25,000 (Ioffe, "Batch
    Renormalization", section 4.1), or with ``steps`` up to 4 % of them, until 31 % and 19 %. ``"pretrained"``: linear
    over all ``steps`` (Lomonaco et al., "Rehearsal-Free Continual Learning over Small Non-I.I.D. Batches", section 4).
    ``"sigmoid"``: logistic in t = ``t_delta`` · step, r_max / (1 + (r_max - 1) e^-t) and d_max / (1 +
    (d_max / 0.001 - 1) e^-2t) (titu1994/BatchRenormalization).
    """
    if schedule == "sigmoid":
        t = step * t_delta
        r = r_max / (1 + (r_max - 1) * xp.exp(-t))
        d = d_max / (1 + (d_max / SIGMOID_START - 1) * xp.exp(-2 * t)) if d_max else xp.zeros_like(t)
        return r, d
    progress = step if steps is None else step / steps
    begin, r_end, d_end = ramps(schedule, steps)

    def ramp(end: float) -> Any:
        return xp.clip((progress - begin) / (end - begin), 0, 1)

    return 1 + (r_max - 1) * ramp(r_end), d_max * ramp(d_end)


def ramps(schedule: Schedule, steps: int | None) -> tuple[float, float, float]:
    """Return where the linear rise of both limits begins and where that of each ends, in steps or shares of them."""
    if schedule == "pretrained":
        return 0.0, 1.0, 1.0
    return _PAPER_STEPS if steps is None else _PAPER_SHARES


def default_limits(schedule: Schedule | None) -> Limits:
    """Return the (r_max, d_max) a schedule ends at: 1.25 and 0.5 for ``"pretrained"``, else 3 and 5."""
    return (1.25, 0.5) if schedule == "pretrained" else (3.0, 5.0)


def checked_limits(r_max: float, d_max: float) -> Limits:
    """Return the limits as floats; raises `ValueError` unless ``r_max >= 1`` and ``d_max >= 0``."""
    if not r_max >= 1:
        raise ValueError(f"expected `r_max` of at least 1, received r_max={r_max}")
    if not d_max >= 0:
        raise ValueError(f"expected `d_max` of at least 0, received d_max={d_max}")
    return float(r_max), float(d_max)


def check_schedule(schedule: Any, steps: Any, t_delta: Any) -> None:
    """Raise `ValueError` for an unknown schedule, or arguments it cannot run with."""
    if schedule not in (None, *get_args(Schedule)):
        raise ValueError(
            f"expected `schedule` to be None or out of {', '.join(get_args(Schedule))}, received schedule={schedule!r}"
        )
    whole = isinstance(steps, int) and steps > 0
    if (schedule == "pretrained" and not whole) or (schedule == "paper" and not whole and steps is not None):
        raise ValueError(
            "expected `schedule_steps`, the number of training calls in the run, with "
            f"schedule={schedule!r}, received schedule_steps={steps}"
        )
    if not t_delta > 0:
        raise ValueError(f"expected `t_delta` above 0, received t_delta={t_delta}")
