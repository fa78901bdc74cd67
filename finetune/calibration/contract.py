"""What calibration needs of a framework: the contract that `torch.layers` and `keras.layers` implement."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from ...convert.equalize import Equalized, Front
from ...convert.state import Array, BatchNormState
from ...convert.targets import GroupNorm, Mode, SwitchNorm
from ...frameworks.detect import framework_of


@dataclass
class Solvable:
    """One replaced layer to be solved: the BatchNorm it was, what it is, and the layer in front of both.

    ``front`` is that layer in the original as equalizing sees it, None if it takes no scale; ``layers`` are the
    replaced layer and the layers in front in the model and in the original. ``spatial`` is seen during the pass.
    """

    state: BatchNormState
    target: GroupNorm | SwitchNorm
    layers: tuple[Any, Any, Any]
    groups: int | None = None
    gates: Array | None = None
    front: Front | None = None
    front_name: str = ""
    mode: Mode = "full"
    spatial: tuple[int, ...] | None = None


class CalibrationLayers(Protocol):
    """The layers of a model that are solved again, and their parameters."""

    def site_layers(self, model: Any) -> Mapping[str, Any]:
        """Return the replaced layers by name, but for BatchRenorm, which computes the original already."""

    def solvable(self, model: Any, original: Any, sites: Mapping[str, Any]) -> dict[str, Solvable]:
        """Return what is known of each replaced layer; raises `InputError` where the original has no BatchNorm."""

    def moments(self, layer: Any, x: Any, state: BatchNormState) -> tuple[Array, Array]:
        """Return the mean and the mean square of what a BatchNorm normalizes its input to, by sample and channel."""

    def spatial(self, layer: Any, x: Any) -> tuple[int, ...]:
        """Return the sizes of a BatchNorm's input but batch and channels."""

    def front_weights(self, layer: Any) -> tuple[Array, Array | None]:
        """Return the weights (C, K) of a layer in front, a row for each output channel, and its bias, in float64."""

    def write(self, site: Solvable, found: Equalized) -> None:
        """Give the replaced layer and the one in front these values."""

    def get_affine(self, layer: Any) -> tuple[Array, Array]:
        """Return the layer's scale and shift in float64."""

    def set_affine(self, layer: Any, gamma: Array, beta: Array) -> None:
        """Give the layer this scale and shift."""

    def outputs(self, model: Any, batch: Any) -> list[NDArray[Any]]:
        """Return what the model returns at inference, array by array."""

    def linear_layers(self, model: Any) -> Mapping[str, Any]:
        """Return the convolutions and linear layers that can be refitted by name."""

    def left_layers(self, model: Any) -> Mapping[str, str]:
        """Return by name why the other convolutions and linear layers cannot be."""

    def picked(self, layer: Any, y: Any, count: int) -> NDArray[Any]:
        """Return some outputs (G, M, O/G) of a linear layer: for each of G groups, at ``count`` positions a sample."""

    def rows(self, layer: Any, x: Any, y: Any, count: int) -> NDArray[Any] | None:
        """Return what the outputs that `picked` returns of y are a linear map of, (G, M, K + 1): windows, and a 1.

        None where a layer's class does not compute its outputs with its weights; `refit` tries all others.
        """

    def get_weights(self, layer: Any) -> Array:
        """Return a linear map's weights (G, K + 1, O/G) in float64, its bias or zeros as the last row."""

    def set_weights(self, layer: Any, weights: Array) -> None:
        """Give the layer these weights; one without a bias ignores the last row."""


def layers_of(model: Any) -> CalibrationLayers:
    """Return what calibrates ``model``; raises as `framework_of` does."""
    if framework_of(model) == "torch":
        from .torch import layers as torch_layers

        return torch_layers
    from .keras import layers as keras_layers

    return keras_layers
