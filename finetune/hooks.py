"""Small objects a training loop calls once a step; they work in any loop, by hand too."""

from collections.abc import Iterable
from typing import Any

from ..layers.schedules import Schedule
from .schedules import renorm_limits


class RenormLimits:
    """Move the limits of every Batch Renormalization along a preset (see `renorm_limits`).

    ``layers`` are modules or layers of either framework; those without ``set_limits``, and those with a schedule of
    their own, are passed over. Limits are set from the step alone and live in the layers' saved state, so a resumed run
    goes on where it was.
    """

    def __init__(self, layers: Iterable[Any], steps: int, preset: Schedule = "pretrained") -> None:
        self.layers = [
            layer for layer in layers if hasattr(layer, "set_limits") and getattr(layer, "schedule", None) is None
        ]
        self.steps, self.preset = steps, preset

    def on_step(self, step: int) -> None:
        """Set the limits for ``step``, before it is taken."""
        r_max, d_max = renorm_limits(self.preset, min(1.0, step / self.steps))
        for layer in self.layers:
            layer.set_limits(r_max, d_max)
