"""The hook that holds Switchable Normalization's gates, and lets them harden."""

from contextlib import ExitStack
from numbers import Integral
from typing import Any

from ...errors import InputError
from .contract import adapter_of
from .hook import Hook, above_zero


class GateSchedule(Hook):
    r"""Hold the gates of every Switchable Normalization at first, then let each mix tend to its largest gate.

    For the first steps the gates have no gradients, and neither averages of gradients nor clipping see any. From there
    to the last step the temperature T falls geometrically between the two of ``temperature``,

    .. math:: T_k = T_0\,(T_1/T_0)^{(k - f)/(n - 1 - f)}

    with f the steps held and n ``steps``. Step 0 divides the logits by the temperature they had before, and the end by
    the last T, which changes no gate; then, with ``harden``, it gives each mix to its largest gate for good. The
    temperature is in the state dict, so that a copy of the model computes what the model does. ::

        with GateSchedule(model, 1000, freeze=0.1, temperature=(1.0, 0.1), harden=True) as hook:
            ...

    In Keras and under `DistributedDataParallel` the optimizer is given the zeros: one of the Adam kind takes them for a
    very small scale, and its first steps after a long freeze are up to 6.6 times the rate.

    Args:
        model: a PyTorch or Keras model.
        steps: the steps of the run.
        freeze: for how long the gates are held. An int counts steps, a float is a share of ``steps``: ``1`` is the
            first step alone, ``1.0`` is all of them.
        temperature: the first and the last T, or None to leave it.
        harden: whether the end gives each mix to its largest gate.

    Raises `InputError` for values out of range; `UnsupportedError` on Keras's JAX backend with ``freeze``.

    Source: Luo et al., "Switchable Normalization for Learning-to-Normalize Deep Representation", section 4 (hard
    gates); Shao et al., "SSN: Learning Sparse Switchable Normalization via SparsestMax" (one normalizer per layer).
    """

    def __init__(
        self,
        model: Any,
        steps: int,
        *,
        freeze: int | float = 0.0,
        temperature: tuple[float, float] | None = None,
        harden: bool = False,
    ) -> None:
        self.steps = above_zero("steps", steps)
        self.held = freeze if isinstance(freeze, Integral) else freeze * steps
        if not 0 <= self.held <= steps:
            raise InputError(f"expected `freeze` within the {steps} steps, received freeze={freeze}")
        if temperature is not None and not min(temperature) > 0:
            raise InputError(f"expected `temperature` above 0, received temperature={temperature}")
        self.temperature, self.harden = temperature, harden
        self._gates = adapter_of(model).Gates(model, held=self.held > 0, tempered=temperature is not None)
        self._begun = False

    def change(self, undo: ExitStack) -> None:
        """Let the gates be held and tempered."""
        self._begun = False
        undo.callback(self._gates.close)
        self._gates.open()

    def on_step(self, step: int) -> None:
        """Hold or free the gates, and set their temperature."""
        super().on_step(step)
        self._gates.hold(step < self.held)
        if step == 0 and not self._begun:
            self._gates.fold()  # a resumed run's temperature is this schedule's own
        self._begun = True
        if self.temperature is not None:
            first, last = self.temperature
            progress = (step - self.held) / max(1.0, self.steps - 1 - self.held)
            self._gates.temper(first * (last / first) ** min(1.0, max(0.0, progress)))

    def on_end(self) -> None:
        """Free the gates, leave the last temperature in their logits, and harden them."""
        super().on_end()
        if self.harden:
            for layer in self._gates.layers:
                layer.harden()
