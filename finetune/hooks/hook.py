"""Small objects a training loop calls once a step; they work in any loop, by hand too.

Each is told the number of the step and sets everything from that alone, so a resumed run needs no more than its step,
and the processes of a distributed one agree. They take the model as `normswap.patch` leaves it, before it is compiled
or wrapped. What changes from step to step is held in tensors or variables, so compiled code is not compiled again.
"""

from collections.abc import Iterable, Iterator
from importlib import import_module
from math import isfinite
from numbers import Integral
from types import ModuleType
from typing import Any

import numpy as np

from ...errors import InputError, VerificationError
from ...frameworks.detect import framework_of
from ...layers.limits import Schedule, check_schedule, default_limits, limits_at
from .schedules import renorm_limits

SIGMOID_RATE = 1e-3
"""How far the logistic curve comes in a step of its own, as in titu1994/BatchRenormalization."""

RENORM_MOMENTUM = 0.03
"""The most a batch weighs in BRN's moving statistics: between BatchNorm's 0.1, too noisy, and its paper's slow 0.01."""


class Hook:
    """What a training loop tells its hooks, of which each overrides what it needs."""

    def on_step(self, step: int) -> None:
        """Prepare the optimizer step of this number, from 0, before its first forward pass."""

    def on_loss(self, step: int, loss: float) -> None:
        """Look at the loss of a step."""

    def on_evaluate(self) -> None:
        """Prepare an evaluation; the next step is prepared by `on_step` as ever."""

    def on_end(self) -> None:
        """Leave a plain patched model behind, after the last step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold beside the model and the step: nothing, for every hook here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""


class Hooks(Hook):
    """Several hooks as one, told in their order, and once of a step however often the loop says its number."""

    def __init__(self, *hooks: Hook) -> None:
        self.hooks = hooks
        self._listening = [hook for hook in hooks if type(hook).on_loss is not Hook.on_loss]
        self._step: int | None = None

    def on_step(self, step: int) -> None:
        """Prepare a step that is not the one prepared last."""
        if step != self._step:
            for hook in self.hooks:
                hook.on_step(step)
            self._step = step

    def on_loss(self, step: int, loss: Any) -> None:
        """Look at the loss, a number or a tensor, which is waited for only if a hook wants it."""
        for hook in self._listening:
            hook.on_loss(step, loss.item() if hasattr(loss, "item") else float(loss))

    def on_evaluate(self) -> None:
        """Prepare an evaluation."""
        for hook in self.hooks:
            hook.on_evaluate()
        self._step = None  # the step under way is to be prepared again

    def on_end(self) -> None:
        """Leave a plain patched model behind."""
        for hook in self.hooks:
            hook.on_end()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each."""
        return {"hooks": [hook.state_dict() for hook in self.hooks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give each its state; raises `InputError` if it was saved with another number of hooks."""
        if len(state["hooks"]) != len(self.hooks):
            raise InputError(
                f"expected the state of {len(self.hooks)} hooks, received that of {len(state['hooks'])}; "
                "resume with the hooks of the run"
            )
        for hook, own in zip(self.hooks, state["hooks"], strict=True):
            hook.load_state_dict(own)
        self._step = None  # what was prepared is of another run


class RenormLimits(Hook):
    """Move the limits of every Batch Renormalization along a preset, over ``steps`` steps.

    The curves are those of `renorm_limits`, or with ``steps=None`` those that ``"paper"`` and ``"sigmoid"`` have in
    steps of their own (see `limits_at`). A layer with a schedule of its own is passed over. The limits live in the
    layers' saved state.

    Raises `InputError` for ``steps`` below 1, `ValueError` for an unknown preset, or ``"pretrained"`` without steps.
    """

    def __init__(self, model: Any, steps: int | None, preset: Schedule = "pretrained") -> None:
        check_schedule(preset, steps, SIGMOID_RATE)
        self.steps = None if steps is None else _checked(steps)
        self.preset = preset
        self._adapter = _adapter(model)
        renorms = (layer for layer in self._adapter.layers(model) if hasattr(layer, "set_limits"))
        self.layers = [layer for layer in renorms if layer.schedule is None]

    def on_step(self, step: int) -> None:
        """Set the limits for ``step``."""
        if self.steps is None:
            limits = limits_at(np, step, self.preset, *default_limits(self.preset), None, SIGMOID_RATE)
        else:
            limits = renorm_limits(self.preset, min(1.0, step / self.steps))
        self._adapter.set_limits(self.layers, *map(float, limits))


class GateSchedule(Hook):
    r"""Hold the gates of every Switchable Normalization at first, then let each mix tend to its largest gate.

    For the first steps (``freeze``: an int counts them, a float is a share of ``steps``) the gates have no gradients,
    and neither averages of gradients nor clipping see any. From there to the last step the temperature T falls
    geometrically between the two of ``temperature``,

    .. math:: T_k = T_0\,(T_1/T_0)^{(k - f)/(n - 1 - f)}

    with f the steps held and n ``steps``. Step 0 divides the logits by the temperature they had before, and the end by
    the last T, which changes no gate; then, with ``harden``, it gives each mix to its largest gate for good. Until then
    a PyTorch state dict holds the logits without the temperature: a model loaded from one needs this hook to go on.

    In Keras and under `DistributedDataParallel` the optimizer is given the zeros: one of the Adam kind takes them for a
    very small scale, and its first steps after a long freeze are up to 6.6 times the rate.

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
        self.steps = _checked(steps)
        self.held = freeze if isinstance(freeze, Integral) else freeze * steps
        if not 0 <= self.held <= steps:
            raise InputError(f"expected `freeze` within the {steps} steps, received freeze={freeze}")
        if temperature is not None and not min(temperature) > 0:
            raise InputError(f"expected `temperature` above 0, received temperature={temperature}")
        self.temperature, self.harden = temperature, harden
        self._gates = _adapter(model).Gates(model, held=self.held > 0, tempered=temperature is not None)
        self._begun = False

    def on_step(self, step: int) -> None:
        """Hold or free the gates, and set their temperature."""
        self._gates.hold(step < self.held)
        if step == 0 and not self._begun:
            self._gates.fold()  # a resumed run's temperature is this schedule's own
        self._begun = True
        if self.temperature is not None:
            first, last = self.temperature
            progress = (step - self.held) / max(1.0, self.steps - 1 - self.held)
            self._gates.temper(first * (last / first) ** min(1.0, max(0.0, progress)))

    def on_end(self) -> None:
        """Free the gates, and leave the last temperature in their logits."""
        self._gates.close()
        if self.harden:
            for layer in self._gates.layers:
                layer.harden()


class Freeze(Hook):
    """Let only a part of the model learn until the end: ``"norm"``, or ``"last:N"`` for its last N blocks.

    Norms are the normalization layers' own parameters. Blocks are a PyTorch model's children with parameters, those of
    a container one by one, and a Keras model's layers with weights; those before the last N keep their statistics too.
    What is frozen already stays so. Make it before the optimizer, and before `compile` in Keras.

    Raises `InputError` for another text, and for more blocks than the model has.
    """

    def __init__(self, model: Any, train: str) -> None:
        self._learning = _adapter(model).Learning(model, train)

    def on_step(self, step: int) -> None:
        """Keep frozen what is."""
        self._learning.keep()

    def on_end(self) -> None:
        """Let learn what did before."""
        self._learning.close()


class Momentum(Hook):
    r"""Let moving statistics average over as many images as with batches of ``images``, however small these are.

    The weight m of a batch becomes, until the end,

    .. math:: m' = 1 - (1 - m)^{b / \mathtt{images}}

    for batches of b images; larger batches keep it. At m = 0.1 the statistics are those of the last ten batches or so,
    which at two images a batch are too few to normalize by. SN, BRN and BatchNorm have it, unless they average over all
    batches. BRN normalizes by its moving statistics in training, too, and m counts as 0.03 at most there, whatever
    the batch. Make it before `compile` in Keras.

    Raises `InputError` for numbers below 1.
    """

    def __init__(self, model: Any, batch_size: int, images: int = 64) -> None:
        share = _checked(batch_size, "batch_size") / max(_checked(images, "images"), batch_size)
        self._undo = _adapter(model).scale_momentum(model, share, RENORM_MOMENTUM)

    def on_end(self) -> None:
        """Give the layers their own momentum."""
        self._undo()


class Blend(Hook):
    r"""Fade every replaced layer in, in training, and the BatchNorm that ``reference`` has in its place out.

    .. math:: y = \lambda_i\,\mathrm{BN}_i(x) + (1 - \lambda_i)\,\mathrm{new}_i(x)

    with BN frozen at its running statistics, one affine map per channel. λ falls linearly from 1 to 0, over the first
    ``1 - stagger`` of the steps in the first layer and over the last in the last: what a layer adapts to behind earlier
    ones is then what it will be given in the end, while the layers after it still compute what they were trained to.
    Evaluations are of the new layers alone, which are what is saved at any time and all that is left in the end.

    Raises `InputError` for values out of range and for a ``reference`` without the layers' BatchNorms;
    `UnsupportedError` for a model without replaced layers, and on Keras's JAX backend.

    Source: Guo et al., "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized
    Batch Normalization", section 3.1 (λ); Baroni et al., "Transformers Don't Need LayerNorm at Inference Time" (one
    layer after the other).
    """

    def __init__(self, model: Any, reference: Any, steps: int, *, stagger: float = 0.5) -> None:
        if not 0 <= stagger < 1:
            raise InputError(f"expected `stagger` from 0 to below 1, received stagger={stagger}")
        self.steps, self.stagger = _checked(steps), stagger
        self._mixes = _adapter(model).blend(model, reference)

    def on_step(self, step: int) -> None:
        """Set each layer's λ."""
        last = max(1, len(self._mixes) - 1)
        for index, mix in enumerate(self._mixes):
            progress = (step / self.steps - self.stagger * index / last) / (1 - self.stagger)
            mix.set(1 - min(1.0, max(0.0, progress)))

    def on_evaluate(self) -> None:
        """Leave the new layers alone."""
        for mix in self._mixes:
            mix.set(0.0)

    def on_end(self) -> None:
        """Take the BatchNorms out for good."""
        for mix in self._mixes:
            mix.close()


class Statistics(Hook):
    """Re-estimate the running statistics of SN and BRN on ``batches`` before every evaluation and at the end.

    Mean and variance become those of all the values a layer sees, while the layers normalize by the batch (see
    `update_statistics`); nothing happens in a model without any. ``batches`` are inputs as the model takes them, or
    pairs whose first part is; an iterator is held in memory. Give it last, since the other hooks settle what the layers
    are given.
    """

    def __init__(self, model: Any, batches: Iterable[Any]) -> None:
        self.model, self._adapter = model, _adapter(model)
        self.batches = list(batches) if isinstance(batches, Iterator) else batches

    def on_evaluate(self) -> None:
        """Re-estimate them."""
        if self._adapter.moving_layers(self.model):
            self._adapter.update_statistics(self.model, self.batches)

    def on_end(self) -> None:
        """Re-estimate them."""
        self.on_evaluate()


class StopAtNaN(Hook):
    """Raise `VerificationError` at a loss that is not finite."""

    def on_loss(self, step: int, loss: float) -> None:
        """Raise if ``loss`` is NaN or infinite."""
        if not isfinite(loss):
            raise VerificationError(
                f"expected a finite loss, received loss={loss} at step={step}; lower the learning rate"
            )


def _adapter(model: Any) -> ModuleType:
    return import_module(f".{framework_of(model)}.hooks", __package__)


def _checked(steps: int, name: str = "steps") -> int:
    if not steps > 0:
        raise InputError(f"expected `{name}` above 0, received {name}={steps}")
    return steps
