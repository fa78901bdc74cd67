"""What exporting needs of a framework: the contract that `torch.trace` and `keras.trace` implement."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from ..frameworks.detect import framework_of
from ..frameworks.example import Inputs
from .traced import Traced


class Tracer(Protocol):
    """One framework's way from a model to an ONNX graph."""

    def trace(self, model: Any, example: Inputs, *, opset: int, dynamic: bool = False) -> Traced:
        """Return ``model`` in inference mode as an ONNX graph, nothing folded.

        The batch is left open, with ``dynamic`` the sizes behind it that can be, too; notes say what the model fixes.
        """

    def refusal(self, model: Any) -> str | None:
        """Return why the model cannot be exported, whatever it is called with, or None."""

    def notes(self, model: Any) -> list[str]:
        """Return what is to be known of a file made from ``model``."""

    def norm_facts(self, model: Any) -> dict[str, dict[str, Any]]:
        """Return kind, eps, groups and gates of each replaced layer, by name."""

    def prune(self, model: Any, threshold: float) -> AbstractContextManager[dict[str, list[str]]]:
        """Close every gate below ``threshold`` within the context, which is a dictionary of those, by layer."""


def tracer_of(model: Any) -> Tracer:
    """Return what traces ``model``; raises as `framework_of` does."""
    if framework_of(model) == "torch":
        from .torch import trace as torch_trace

        return torch_trace
    from .keras import trace as keras_trace

    return keras_trace
