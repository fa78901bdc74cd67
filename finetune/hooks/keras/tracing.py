"""What a Keras model has compiled, and what it reads anew there."""

from typing import Any

import keras

from ....errors import UnsupportedError
from ....frameworks.keras import distinct_layers

_FUNCTIONS = ("train", "test", "predict")


def retrace(model: keras.Layer) -> None:
    """Have every model within trace its functions anew, in the middle of a ``fit`` too."""
    for layer in distinct_layers(model):
        for kind in _FUNCTIONS if isinstance(layer, keras.Model) else ():
            if getattr(layer, f"{kind}_function", None) is not None:
                getattr(layer, f"make_{kind}_function")(force=True)


def share(what: str, value: float) -> Any:
    """Return a variable that is no layer's; raises `UnsupportedError` where compiled code would not read it anew."""
    if keras.backend.backend() == "jax":
        raise UnsupportedError(f"expected the TensorFlow or PyTorch backend for {what}, received backend='jax'")
    return keras.Variable(value, trainable=False, autocast=False, name="share")
