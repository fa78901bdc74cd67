"""What calibration needs of a framework: the contract that `torch.layers` and `keras.layers` implement."""

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from ...frameworks.detect import framework_of
from .least_squares import Array


class CalibrationLayers(Protocol):
    """The layers of a model that are solved again, and their parameters."""

    def site_layers(self, model: Any) -> Mapping[str, Any]:
        """Return the replaced layers by name, but for BatchRenorm, which computes the original already."""

    def linear_layers(self, model: Any) -> Mapping[str, Any]:
        """Return the convolutions and linear layers that can be refitted by name."""

    def channels_last(self, layer: Any, x: Any, y: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return what a layer was given and returned as arrays with the channels last, without an activation in it."""

    def get_affine(self, layer: Any) -> tuple[Array, Array]:
        """Return the layer's scale and shift in float64."""

    def set_affine(self, layer: Any, gamma: Array, beta: Array) -> None:
        """Give the layer this scale and shift."""

    def get_weights(self, layer: Any) -> Array:
        """Return a linear map's weights (K + 1, O) in float64, its bias or zeros as the last row."""

    def set_weights(self, layer: Any, weights: Array) -> None:
        """Give the layer these weights; one without a bias ignores the last row."""

    def patches(self, layer: Any, sample: NDArray[Any]) -> NDArray[Any]:
        """Return what each output of the layer is a linear map of, (M, K): one sample's windows, and a 1."""


def layers_of(model: Any) -> CalibrationLayers:
    """Return what calibrates ``model``; raises as `framework_of` does."""
    if framework_of(model) == "torch":
        from .torch import layers as torch_layers

        return torch_layers
    from .keras import layers as keras_layers

    return keras_layers
