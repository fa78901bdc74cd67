"""Which framework a model belongs to, without importing a framework the user has not."""

import sys
from typing import Any, Literal

from ..errors import InputError

Framework = Literal["torch", "keras"]


def framework_of(model: Any) -> Framework:
    """Return the framework of ``model``; raises `InputError` for anything but a torch module or a Keras model.

    Keras is asked first: on its torch backend a Keras model is a torch module too.
    """
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if keras is not None and isinstance(model, keras.Layer):
        return "keras"
    if torch is not None and isinstance(model, torch.nn.Module):
        return "torch"
    origin = f"{type(model).__module__}.{type(model).__qualname__}"
    if origin.startswith("tf_keras.") or any(c.__module__.startswith("tf_keras.") for c in type(model).__mro__):
        raise InputError(f"expected a Keras 3 model, received {origin} of Keras 2; load it again with `keras`")
    raise InputError(f"expected a torch.nn.Module or a Keras 3 model, received {origin}")


def example_input(model: Any, shape: tuple[int, ...]) -> Any:
    """Return a batch of two zero samples of ``shape`` as the model takes it."""
    if framework_of(model) == "torch":
        return sys.modules["torch"].zeros(2, *shape)
    import numpy as np

    return np.zeros((2, *shape), np.float32)
