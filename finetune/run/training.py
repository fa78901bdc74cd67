"""What the engines of both frameworks are told to do, and what they tell of each step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, get_args

from numpy.typing import NDArray

from ...data.augment import policies
from ...errors import InputError, NormswapError, UsageError, named, option, said
from ..hooks.freeze import check_train

Array = NDArray[Any]
Optimizer = Literal["sgd", "adam", "adamw", "amsgrad"]
Schedule = Literal["cosine", "constant", "step", "poly", "plateau"]
Precision = Literal["no", "fp16", "bf16"]

EPSILON = 1e-8
"""What Adam and its kin add to the root of the second moment; the frameworks' own differ."""
RATE, RATE_IMAGES = 0.05, 64
"""The rate of SGD for steps of so many images or more."""
ADAM_RATE = 0.001
"""That of Adam and its kin, whose steps do not depend on how long gradients are."""
RATE_OF_LOSS = 0.005
"""The rate of a model that is taught, as a share of the loss it starts with, or of `LEAST_LOSS` if that is less."""
LEAST_LOSS = 1e-3
SEEDS = 2**63
"""How many seeds a generator of PyTorch's takes."""
MOST = 2**31 - 1
"""How many steps, images or processes there can be, far above what ends in a lifetime."""
LARGEST = 1e30
"""How large a factor can be, for what it multiplies to be a float32."""
DECIDING = 8
"""How many images decide before a training whether a model returns probabilities."""

_READ: Mapping[str, tuple[str, tuple[str, ...], Any]] = {
    "momentum": ("optimizer", ("sgd",), 0.9),
    "milestones": ("schedule", ("step",), (0.3, 0.6, 0.9)),
    "factor": ("schedule", ("step", "plateau"), 0.1),
    "power": ("schedule", ("poly",), 1.0),
    "patience": ("schedule", ("plateau",), 10),
    "min_lr": ("schedule", ("plateau",), 0.0),
}
"""Of settings that one choice reads and others do not: whose choice, those that read it, and what it is by default."""


@dataclass(frozen=True)
class Training:
    """How a model is trained for ``steps`` steps of ``optimizer``.

    A step takes ``accumulate`` batches of ``batch_size`` images, over all processes together. ``lr`` is the peak of
    the rate, which rises over a share ``warmup`` of the steps and then follows ``schedule`` (see `Rate`); the gates of
    SN learn at ``gate_lr`` times that. What only some optimizers or schedules read is None, for its default, with the
    others: ``momentum`` of ``"sgd"`` (0.9); ``milestones`` of ``"step"``, shares of the steps or epochs (0.3, 0.6,
    0.9); ``factor`` of ``"step"`` and ``"plateau"`` (0.1); ``power`` of ``"poly"`` (1); ``patience``, in evaluations,
    and ``min_lr`` of ``"plateau"`` (10 and 0).
    Gradients whose norm, over all that learns, is above ``max_grad_norm`` are scaled down to it, unless it is 0; the
    default rates are for 1. ``weight_decay`` spares norms, biases and gates; it is added to the gradient, but with
    ``"adamw"`` taken off the weights. ``train`` names what learns: ``"all"``, ``"norm"`` (the normalization layers' own
    parameters) or ``"last:N"`` (the last N blocks, see `blocks` of the framework); what is frozen already never does.
    ``precision`` is that of the forward and backward passes.
    ``ema`` is the weight of the old value in a moving average of the weights, 0 for none. With a teacher the loss is
    T²·KL(teacher || student) of scores softened by ``temperature`` T, plus ``features`` times the distance of the
    replaced layers' outputs. ``augment`` is `normswap.data.augment`'s policy, ``workers`` read images ahead.
    With ``sync_statistics`` SN and BRN take their batch statistics over all processes or replicas, else over each one's
    own images, as BatchNorm does. Order of the data, rates and random numbers depend on ``seed`` and the step alone.

    Raises `InputError` for a value out of range, `UsageError` for one that the optimizer or the schedule does not read.
    """

    steps: int = 100
    batch_size: int = 64
    lr: float = 0.05
    train: str = "all"
    optimizer: Optimizer = "sgd"
    momentum: float | None = None
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    milestones: tuple[float, ...] | None = None
    factor: float | None = None
    power: float | None = None
    patience: int | None = None
    min_lr: float | None = None
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    gate_lr: float = 1.0
    accumulate: int = 1
    precision: Precision = "no"
    ema: float = 0.0
    temperature: float = 2.0
    features: float = 0.0
    augment: str = "none"
    workers: int = 0
    sync_statistics: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "accumulate", "temperature"):
            if not (getattr(self, name) is None or getattr(self, name) > 0):
                raise InputError(f"expected `{name}` above 0, received {name}={getattr(self, name)}")
        for name in ("max_grad_norm", "weight_decay", "gate_lr", "features", "workers", "seed"):
            if not getattr(self, name) >= 0:
                raise InputError(f"expected `{name}` of at least 0, received {name}={getattr(self, name)}")
        for name in ("steps", "batch_size", "accumulate", "workers"):
            if getattr(self, name) > MOST:
                raise InputError(f"expected `{name}` of up to {MOST}, received {name}={getattr(self, name)}")
        for name in ("lr", "weight_decay", "gate_lr", "temperature", "features"):
            if (getattr(self, name) or 0) > LARGEST:
                raise InputError(f"expected `{name}` of up to {LARGEST}, received {name}={getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise InputError(f"expected `ema` from 0 to below 1, received ema={self.ema}")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"expected `warmup` from 0 to 1, received warmup={self.warmup}")
        for name, known in (("optimizer", Optimizer), ("schedule", Schedule), ("precision", Precision)):
            if getattr(self, name) not in get_args(known):
                choices = ", ".join(get_args(known))
                raise InputError(f"expected `{name}` out of {choices}, received {getattr(self, name)!r}")
        self._check_read()
        policies(self.augment)
        check_train(self.train)

    def _check_read(self) -> None:
        """Raise for what the optimizer or the schedule does not read, or cannot use."""
        for name, (which, readers, _) in _READ.items():
            value, chosen = getattr(self, name), getattr(self, which)
            if value is not None and chosen not in readers:
                wanted = " or ".join(option(which, reader) for reader in readers)
                raise UsageError(f"expected {wanted} for {named(name)}, received {option(which, chosen)}; leave it out")
        for name in ("power", "patience"):
            if not self.setting(name) > 0:
                raise InputError(f"expected `{name}` above 0, received {name}={self.setting(name)}")
        if not self.setting("min_lr") >= 0:
            raise InputError(f"expected `min_lr` of at least 0, received min_lr={self.setting('min_lr')}")
        if not 0 <= self.setting("momentum") < 1:
            raise InputError(f"expected `momentum` from 0 to below 1, received momentum={self.setting('momentum')}")
        if not 0 < self.setting("factor") < 1:
            raise InputError(f"expected `factor` between 0 and 1, received factor={self.setting('factor')}")
        if self.milestones is not None:
            object.__setattr__(self, "milestones", tuple(float(at) for at in self.milestones))
        at = self.setting("milestones")
        alike = bool(at) and (0 < at[0] <= at[-1] < 1 or 1 <= at[0] <= at[-1] < inf)
        if not alike or list(at) != sorted(set(at)):
            raise InputError(
                "expected `milestones` that rise, all below 1, as shares of the steps, or all from 1 on, as epochs, "
                f"received milestones={','.join(f'{each:g}' for each in at)}"
            )

    def setting(self, name: str) -> Any:
        """Return what a setting is that only some choices read, its default where it is None."""
        value = getattr(self, name)
        return _READ[name][2] if value is None else value


@dataclass(frozen=True)
class Taken:
    """One step: how many have been taken, its mean loss and the share of its labels that were right, in percent.

    ``accuracy`` is None where the labels took no part. ``state()`` returns what a later run needs to go on from here
    beside the weights, by name. Within ``averaged()`` the model has the moving average of its weights, where one is
    kept.
    """

    step: int
    loss: float
    accuracy: float | None
    lr: float
    state: Callable[[], dict[str, Array]]
    averaged: Callable[[], AbstractContextManager[None]]


OnStep = Callable[[Taken], bool | None]
"""Called after each step; a true answer ends the training."""

State = Mapping[str, Array]


def unread(choices: Mapping[str, Any]) -> list[str]:
    """Return the settings that the optimizer or the schedule, where ``choices`` has it, does not read."""
    return [name for name, (which, readers, _) in _READ.items() if which in choices and choices[which] not in readers]


def default_rate(images: int, loss: float | None = None, optimizer: Optimizer = "sgd") -> float:
    r"""Return the peak rate for steps of so many images, of a model that is taught by the ``loss`` it starts with.

    Gradients are clipped, so a step is about as long as the rate, wherever it starts. One that goes down from a loss L
    with a gradient g, and 0 for the least there can be, is in proportion to :math:`L/\lVert g\rVert` (Polyak's step
    length): a model that calibration has brought near its teacher takes small steps, one that is far off large ones, up
    to those of a model that learns from labels. Below `RATE_IMAGES` it is less in proportion, for gradients that are
    more a batch's own. Adam and its kin have the same shares of a rate of their own.
    """
    rate = RATE if loss is None else min(RATE, RATE_OF_LOSS * max(loss, LEAST_LOSS))
    return rate * min(1.0, images / RATE_IMAGES) * (1.0 if optimizer == "sgd" else ADAM_RATE / RATE)


@contextmanager
def taking(shape: Sequence[int], failing: Callable[[BaseException], str]) -> Iterator[None]:
    """Tell what a model raises on a batch of ``shape`` as its own, within a ``with`` block; ``failing`` says where.

    Some of a training's batches may be such that inference, which was tried, takes what training does not.
    """
    try:
        yield
    except NormswapError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"expected a batch that the model can be trained on, received one of shape {tuple(shape)} on which "
            f"{failing(error)} fails: {said(error)}; give another {named('batch_size')}"
        ) from error


def not_finite(loss: float, step: int) -> str:
    """Return what is said of a loss that is not finite."""
    return f"expected a finite loss, received loss={loss} at step={step}; lower {named('lr')}"
