"""Schedules as plain functions of how far a run has come, so that a resumed run needs no more than its step."""

from collections.abc import Callable, Mapping
from math import cos, pi
from typing import Literal

Preset = Literal["pretrained", "paper"]
Limits = tuple[float, float]


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.05) -> float:
    """Return the rate at ``step`` of ``steps``: linear up to ``peak`` over a share ``warmup``, then a cosine to 0."""
    begin = max(1, round(steps * warmup))
    if step < begin:
        return peak * (step + 1) / begin
    return peak * 0.5 * (1 + cos(pi * (step - begin) / max(1, steps - begin)))


def renorm_limits(preset: Preset, progress: float) -> Limits:
    """Return Batch Renormalization's (r_max, d_max) at ``progress`` (0 to 1) of a run.

    ``"pretrained"``: 1 to 1.25 and 0 to 0.5, linearly (Lomonaco et al., "Rehearsal-Free Continual Learning over
    Small Non-I.I.D. Batches", section 4). ``"paper"``: plain BatchNorm for the first 4 %, r_max to 3 at 31 % and
    d_max to 5 at 19 % (Ioffe, "Batch Renormalization", section 4.1: steps 5,000, 40,000 and 25,000 of 130,000).
    """
    return _PRESETS[preset](progress)


def _pretrained(progress: float) -> Limits:
    return 1 + 0.25 * progress, 0.5 * progress


def _paper(progress: float) -> Limits:
    return 1 + 2 * _ramp(progress, 0.04, 0.31), 5 * _ramp(progress, 0.04, 0.19)


def _ramp(x: float, start: float, end: float) -> float:
    return min(1.0, max(0.0, (x - start) / (end - start)))


_PRESETS: Mapping[Preset, Callable[[float], Limits]] = {"pretrained": _pretrained, "paper": _paper}
