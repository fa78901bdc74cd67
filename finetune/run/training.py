"""What the engines of both frameworks are told to do, and what they tell of each step."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from numpy.typing import NDArray

from ...data.augment import policies
from ...errors import InputError, named
from ..hooks.freeze import check_train
from ..hooks.schedules import Decay

Array = NDArray[Any]
Precision = Literal["no", "fp16", "bf16"]

MAX_GRADIENT_NORM = 1.0
MOMENTUM = 0.9
RATE, RATE_IMAGES = 0.05, 64
"""The rate for steps of so many images or more."""
RATE_OF_LOSS = 0.005
"""The rate of a model that is taught, as a share of the loss it starts with, or of `LEAST_LOSS` if that is less."""
LEAST_LOSS = 1e-3
SEEDS = 2**63
"""How many seeds a generator of PyTorch's takes."""
DECIDING = 8
"""How many images decide before a training whether a model returns probabilities."""


@dataclass(frozen=True)
class Training:
    """How a model is trained for ``steps`` steps of SGD with momentum 0.9, gradients clipped at norm 1.

    A step takes ``accumulate`` batches of ``batch_size`` images, over all processes together. ``lr`` is the peak of
    the rate, which rises over a share ``warmup`` of the steps and then follows ``decay``; the gates of SN learn at
    ``gate_lr`` times that. ``weight_decay`` spares norms, biases and gates. ``train`` names what learns: ``"all"``,
    ``"norm"`` (the normalization layers' own parameters) or ``"last:N"`` (the last N blocks, see `blocks` of the
    framework); what is frozen already never does. ``precision`` is that of the forward and backward passes.
    ``ema`` is the weight of the old value in a moving average of the weights, 0 for none. With a teacher the loss is
    T²·KL(teacher || student) of scores softened by ``temperature`` T, plus ``features`` times the distance of the
    replaced layers' outputs. ``augment`` is `normswap.data.augment`'s policy, ``workers`` read images ahead.
    Order of the data, rates and random numbers depend on ``seed`` and the step alone.

    Raises `InputError` for a value out of range.
    """

    steps: int = 100
    batch_size: int = 64
    lr: float = 0.05
    train: str = "all"
    decay: Decay = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    gate_lr: float = 1.0
    accumulate: int = 1
    precision: Precision = "no"
    ema: float = 0.0
    temperature: float = 2.0
    features: float = 0.0
    augment: str = "none"
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "accumulate", "temperature"):
            if not (getattr(self, name) is None or getattr(self, name) > 0):
                raise InputError(f"expected `{name}` above 0, received {name}={getattr(self, name)}")
        for name in ("weight_decay", "gate_lr", "features", "workers", "seed"):
            if not getattr(self, name) >= 0:
                raise InputError(f"expected `{name}` of at least 0, received {name}={getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise InputError(f"expected `ema` from 0 to below 1, received ema={self.ema}")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"expected `warmup` from 0 to 1, received warmup={self.warmup}")
        for name, known in (("decay", get_args(Decay)), ("precision", get_args(Precision))):
            if getattr(self, name) not in known:
                raise InputError(f"expected `{name}` out of {', '.join(known)}, received {getattr(self, name)!r}")
        policies(self.augment)
        check_train(self.train)


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


def default_rate(images: int, loss: float | None = None) -> float:
    r"""Return the peak rate for steps of so many images, of a model that is taught by the ``loss`` it starts with.

    Gradients are clipped, so a step is about as long as the rate, wherever it starts. One that goes down from a loss L
    with a gradient g, and 0 for the least there can be, is in proportion to :math:`L/\lVert g\rVert` (Polyak's step
    length): a model that calibration has brought near its teacher takes small steps, one that is far off large ones, up
    to those of a model that learns from labels. Below `RATE_IMAGES` it is less in proportion, for gradients that are
    more a batch's own.
    """
    rate = RATE if loss is None else min(RATE, RATE_OF_LOSS * max(loss, LEAST_LOSS))
    return rate * min(1.0, images / RATE_IMAGES)


def not_finite(loss: float, step: int) -> str:
    """Return what is said of a loss that is not finite."""
    return f"expected a finite loss, received loss={loss} at step={step}; lower {named('lr')}"
