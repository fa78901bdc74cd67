"""The hook that moves Batch Renormalization's limits."""

from typing import Any

import numpy as np

from ...layers.limits import Schedule, check_schedule, default_limits, limits_at
from .contract import adapter_of
from .hook import Hook, above_zero
from .schedules import renorm_limits

SIGMOID_RATE = 1e-3
"""How far the logistic curve comes in a step of its own, as in titu1994/BatchRenormalization."""


class RenormLimits(Hook):
    """Move the limits of every Batch Renormalization along a preset, over ``steps`` steps.

    The curves are those of `renorm_limits`, or with ``steps=None`` those that ``"paper"`` and ``"sigmoid"`` have in
    steps of their own (see `limits_at`). A layer with a schedule of its own is passed over. The limits are the layers'
    state, saved with the weights, and stay where the last step put them::

        with RenormLimits(model, 1000, "paper") as hook:
            ...

    Args:
        model: a PyTorch or Keras model.
        steps: how many the curve takes, or None.
        preset: ``"pretrained"``, ``"paper"`` or ``"sigmoid"``.

    Raises `InputError` for ``steps`` below 1, `ValueError` for an unknown preset, or ``"pretrained"`` without steps.
    """

    def __init__(self, model: Any, steps: int | None, preset: Schedule = "pretrained") -> None:
        check_schedule(preset, steps, SIGMOID_RATE)
        self.steps = None if steps is None else above_zero("steps", steps)
        self.preset = preset
        self._adapter = adapter_of(model)
        self.layers = [layer for layer in self._adapter.renorms(model) if layer.schedule is None]

    def on_step(self, step: int) -> None:
        """Set the limits for ``step``."""
        super().on_step(step)
        if self.steps is None:
            limits = limits_at(np, step, self.preset, *default_limits(self.preset), None, SIGMOID_RATE)
        else:
            limits = renorm_limits(self.preset, min(1.0, step / self.steps))
        self._adapter.set_limits(self.layers, *map(float, limits))
