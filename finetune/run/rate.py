"""The learning rate at every step of a training, by the step alone, and by the evaluations where they lower it."""

from bisect import bisect_right
from math import cos, pi
from typing import NamedTuple

from .training import Training

LEAST_GAIN = 1e-4
"""By how much a loss has to be lower than the lowest so far to count as better."""


class Rate:
    r"""The rate of a training on so many ``images``: linear up to its peak, then along its schedule.

    With p the share of the steps after the warm-up that are done, the rate is the peak times

    - ``"cosine"``: :math:`(1 + \cos \pi p) / 2`
    - ``"poly"``: :math:`(1 - p)^\mathrm{power}`
    - ``"step"``: the factor to the power of the number of milestones passed
    - ``"plateau"``: the factor to the power of ``reductions``, and at least ``min_lr`` (see `Plateau`)
    - ``"constant"``: 1

    Milestones below 1 are shares of the steps, others epochs, and count from the training's first step.
    """

    def __init__(self, training: Training, images: int) -> None:
        self._training, self._schedule = training, training.schedule
        self._warm = max(1, round(training.steps * training.warmup))
        self._factor, self._power = training.setting("factor"), training.setting("power")
        self._least = training.setting("min_lr") / training.lr
        per_epoch = images / (min(training.batch_size, images) * training.accumulate)
        self._milestones = [
            round(at * (training.steps if at < 1 else per_epoch)) for at in training.setting("milestones")
        ]

    def at(self, step: int, peak: float, reductions: int = 0) -> float:
        """Return the rate at a step for what learns at ``peak``, after so many reductions on a plateau."""
        steps, warm = self._training.steps, self._warm
        if self._schedule == "plateau":
            peak *= min(1.0, max(self._factor**reductions, self._least))
        if step < warm:
            return peak * (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        if self._schedule == "cosine":
            return peak * 0.5 * (1 + cos(pi * (step - warm) / max(1, steps - warm)))
        if self._schedule == "poly":
            return float(peak * (1 - done) ** self._power)
        if self._schedule == "step":
            return float(peak * self._factor ** bisect_right(self._milestones, step))
        return peak


class Plateau(NamedTuple):
    """How often the rate was lowered, the lowest loss of an evaluation, and how many since were no better."""

    reductions: int = 0
    least: float | None = None
    waited: int = 0

    def after(self, loss: float, patience: int) -> "Plateau":
        """Return what it is after an evaluation: the rate is lowered after ``patience`` in a row that are no better."""
        if self.least is None or loss < self.least - LEAST_GAIN:
            return Plateau(self.reductions, loss, 0)
        waits = self.waited + 1 < patience
        return Plateau(self.reductions + (not waits), self.least, self.waited + 1 if waits else 0)
