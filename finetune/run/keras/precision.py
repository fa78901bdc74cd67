"""The precision a Keras model is trained in."""

import keras

from ....errors import UnsupportedError
from ....frameworks.keras import distinct_layers

_POLICIES = {"no": "float32", "bf16": "mixed_bfloat16"}


class Precision:
    """The policies of a model's layers: in a training's passes those of its precision, else their own.

    Layers with a policy of their choice keep it, and so do those that end in a softmax, of which too little is left.

    Raises `UnsupportedError` for ``"fp16"``.
    """

    def __init__(self, model: keras.Model, precision: str) -> None:
        if precision not in _POLICIES:
            raise UnsupportedError(
                f"expected precision=no or bf16 for a Keras model, received precision={precision}, which needs a "
                "scaled loss; use bf16"
            )
        self._policy = _POLICIES[precision]
        layers = [layer for layer in distinct_layers(model) if layer.dtype_policy.name == "float32"]
        self._layers = [] if precision == "no" else [layer for layer in layers if not _is_softmax(layer)]

    def narrow(self) -> None:
        """Give the layers the training's policy."""
        self._give(self._policy)

    def restore(self) -> None:
        """Give the layers their own."""
        self._give("float32")

    def _give(self, policy: str) -> None:
        for layer in self._layers:
            layer.dtype_policy = policy


def _is_softmax(layer: keras.Layer) -> bool:
    return isinstance(layer, keras.layers.Softmax) or getattr(layer, "activation", None) is keras.activations.softmax
