"""Which framework a model belongs to, without importing a framework the user has not."""

import sys
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from .contract import Framework

Name = Literal["torch", "keras"]


def get_framework(model: Any) -> "Framework":
    """Return what can be asked of ``model``, by its framework; raises as `framework_of` does."""
    if framework_of(model) == "torch":
        from . import torch

        return torch
    from . import keras

    return keras


def framework_of(model: Any) -> Name:
    """Return the framework of ``model``.

    Raises `UnsupportedError` for a Keras 2 model, `InputError` for anything else but a torch module or a Keras model.

    Keras is asked first: on its torch backend a Keras model is a torch module too.
    """
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if keras is not None and isinstance(model, keras.Layer):
        return "keras"
    if torch is not None and isinstance(model, torch.nn.Module):
        return "torch"
    origin = f"{type(model).__module__}.{type(model).__qualname__}"
    if origin.startswith("tf_keras.") or any(c.__module__.startswith("tf_keras.") for c in type(model).__mro__):
        raise UnsupportedError(f"expected a Keras 3 model, received {origin} of Keras 2; load it again with `keras`")
    raise InputError(f"expected a torch.nn.Module or a Keras 3 model, received {origin}")


def traced_shape(model: Any) -> tuple[int | None, ...] | None:
    """Return the shape of the one input a torch module was traced for, None where a size is free; None if unknown."""
    nodes = getattr(getattr(model, "graph", None), "nodes", ())
    inputs = [node.meta.get("val") for node in nodes if node.op == "placeholder"]
    if len(inputs) != 1 or not hasattr(inputs[0], "shape"):
        return None
    return tuple(size if isinstance(size, int) else None for size in inputs[0].shape)
