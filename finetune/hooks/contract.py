"""What the hooks ask of a framework, which `hooks.torch` and `hooks.keras` answer alike."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from ...frameworks.detect import framework_of
from .scores import Logits


class HeldGates(Protocol):
    """The gates of every SN of a model, while a schedule holds and tempers them."""

    @property
    def layers(self) -> Sequence[Any]:
        """The SN layers."""

    def open(self) -> None:
        """Let the gates be held and tempered; what they compute stays."""

    def hold(self, held: bool) -> None:
        """Let gradients reach the gates, or not."""

    def temper(self, temperature: float) -> None:
        """Set the temperature."""

    def fold(self) -> None:
        """Leave the temperature in the logits, which changes no gate."""

    def close(self) -> None:
        """Leave plain gates of the same values."""


class LearningPart(Protocol):
    """The part of a model that learns while this is open."""

    def open(self) -> None:
        """Freeze the rest."""

    def keep(self) -> None:
        """Keep the rest frozen, whatever a loop has set since."""

    def close(self) -> None:
        """Let learn what did before."""


class Mixed(Protocol):
    """A replaced layer, while a frozen BatchNorm has a share in its output."""

    def open(self) -> None:
        """Put the BatchNorm in, with no share."""

    def set(self, share: float) -> None:
        """Set the BatchNorm's share."""

    def close(self) -> None:
        """Take the BatchNorm out."""


class Adapter(Protocol):
    """What the hooks can do to a model of either framework; nothing here but what says so changes one."""

    def Gates(self, model: Any, *, held: bool, tempered: bool) -> HeldGates:  # noqa: N802
        """Return the model's gates, to be ``held``, ``tempered`` or both once they are opened."""

    def Learning(self, model: Any, train: str) -> LearningPart:  # noqa: N802
        """Return the part of a model that ``train`` names; raises `InputError` where it names none."""

    def check_part(self, model: Any, train: str) -> None:
        """Raise `InputError` unless ``train`` names a part of ``model``."""

    def blend(self, model: Any, reference: Any) -> Sequence[Mixed]:
        """Return every replaced layer with the reference's BatchNorm to mix in, in the order of the model."""

    def scale_momentum(self, model: Any, share: float, renorm: float) -> Callable[[], None]:
        """Let a batch weigh as the ``share`` of one in all moving statistics, and return what undoes it."""

    def renorms(self, model: Any) -> Sequence[Any]:
        """Return every BRN."""

    def set_limits(self, renorms: Iterable[Any], r_max: float, d_max: float) -> None:
        """Set the limits of these BRN."""

    def moving_layers(self, model: Any) -> Sequence[Any]:
        """Return every SN, BRN and BatchNorm that keeps moving statistics."""

    def update_statistics(self, model: Any, batches: Iterable[Any]) -> Callable[[], None]:
        """Re-estimate moving statistics on ``batches``, and return what gives the old ones back."""

    def replaced(self, model: Any) -> Mapping[str, Any]:
        """Return the replaced layers, each by the first of its names."""

    def learns(self) -> bool:
        """Return whether what runs is to be learned from, and is no pass at inference."""

    def infer(self, model: Any, x: Any) -> Any:
        """Return the scores of a model at inference, without gradients."""

    def as_logits(self, scores: Any, known: Logits) -> Any:
        """Return the logits of scores, which decide what is ``known`` of them where their values can be read."""

    def divergence(self, output: Any, wanted: Any, temperature: float) -> Any:
        """Return T²·KL(wanted || output) of logits."""

    def distance(self, output: Any, wanted: Any) -> Any:
        """Return the mean squared distance over the variance of ``wanted``, where that varies."""


def adapter_of(model: Any) -> Adapter:
    """Return what the hooks can do to ``model``; raises as `framework_of` does."""
    if framework_of(model) == "torch":
        from . import torch as torch_hooks

        return torch_hooks
    from . import keras as keras_hooks

    return keras_hooks
