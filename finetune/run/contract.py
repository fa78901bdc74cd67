"""What a run asks of a framework: files of the same names in `torch` and `keras` answer alike."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from ...data.dataset import Data
from ...frameworks.detect import framework_of
from ..hooks.hook import Hook
from .training import Array, OnStep, State, Training

Gates = dict[str, tuple[Array, Array]]
"""The gates of each Switchable Normalization by its name: those of the mean and those of the variance."""


class RenormStatistics(NamedTuple):
    """What the Batch Renormalizations of a model hold, one after the other: arrays of all their C channels.

    ``sigma`` is the root of the running variance plus ε, ``weight`` that of a batch in the running statistics, and
    ``layer`` the number of the layer.
    """

    mean: Array
    sigma: Array
    r_max: Array
    d_max: Array
    weight: Array
    layer: Array


class Trainer(Protocol):
    """Trains models of one framework, alone or in several processes; implemented by the folders' ``trainer``."""

    def train(
        self,
        model: Any,
        data: Data,
        training: Training,
        *,
        teacher: Any = None,
        hooks: Sequence[Hook] = (),
        first: int = 0,
        start: int = 0,
        state: State | None = None,
        reductions: Callable[[], int] = int,
        on_step: OnStep | None = None,
    ) -> None:
        """Train ``model`` in place from step ``start`` to the last of ``training``."""

    def predict(self, model: Any, x: Array, batch_size: int = 256) -> Array:
        """Return the model's scores at inference for inputs (N, ...), computed ``batch_size`` at a time."""

    def place(self, model: Any) -> None:
        """Put ``model`` on the device where it will be trained."""

    def processes(self) -> tuple[int, int]:
        """Return this process's rank and how many train together."""

    def agree(self, model: Any) -> None:
        """Give the model of every process what rank 0's has beside parameters, such as the statistics of its images."""

    def seed(self, number: int) -> None:
        """Let the weights of a model that is built next depend on ``number`` alone."""

    def gathered(self, value: Any) -> list[Any]:
        """Return the value of every process, in the order of their ranks."""

    def shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """Return the shape of every entry of the model's state, by name."""


class Readings(Protocol):
    """What figures are made of in a model of one framework; implemented by the folders' ``figures``."""

    def gates(self, model: Any) -> Gates:
        """Return the gates of every Switchable Normalization by name, those of the mean and those of the variance."""

    def renorm_statistics(self, model: Any) -> Callable[[], RenormStatistics | None]:
        """Return what reads the statistics of all Batch Renormalizations at once, None if there are none."""


def trainer_of(model: Any) -> Trainer:
    """Return what trains ``model``; raises as `framework_of` does."""
    if framework_of(model) == "torch":
        from .torch import trainer as torch_trainer

        return torch_trainer
    from .keras import trainer as keras_trainer

    return keras_trainer


def readings_of(model: Any) -> Readings:
    """Return what reads the figures of ``model``; raises as `framework_of` does."""
    if framework_of(model) == "torch":
        from .torch import figures as torch_figures

        return torch_figures
    from .keras import figures as keras_figures

    return keras_figures
