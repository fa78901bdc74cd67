"""Replaced layers of a Keras model with a share of the BatchNorm that was there."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import keras
from keras import ops

from ....errors import InputError, UnsupportedError
from ....frameworks.keras import named_layers, override
from ....layers.keras.statistics import wide
from ....patchers.keras.swap import BatchNorm
from .layers import replaced
from .tracing import retrace, share


class Mix:
    """A replaced layer, while a frozen BatchNorm has a share in its output."""

    def __init__(self, model: keras.Layer, layer: keras.Layer, norm: keras.Layer) -> None:
        parts = (norm.moving_mean, norm.moving_variance, norm.gamma, norm.beta)
        self._mean, self._var, self._gamma, self._beta = (
            None if part is None else ops.convert_to_numpy(part) for part in parts
        )
        self._model, self._layer, self._axis, self._epsilon = model, layer, norm.axis, norm.epsilon
        self._share = share("a blend", 0.0)
        self._undo = ExitStack()

    def open(self) -> None:
        """Put the BatchNorm in, with no share."""
        self._undo.callback(retrace, self._model)
        self._undo.callback(override(self._layer, "call", self._mixing))
        retrace(self._model)

    def _mixing(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            output = run(inputs, *args, **kwargs)
            before = ops.batch_normalization(
                wide(inputs), self._mean, self._var, self._axis, self._beta, self._gamma, self._epsilon
            )
            part = ops.cast(self._share, output.dtype)
            return (1 - part) * output + part * ops.cast(before, output.dtype)

        return call

    def set(self, share: float) -> None:
        """Set the BatchNorm's share."""
        self._share.assign(share)

    def close(self) -> None:
        """Take the BatchNorm out."""
        self.set(0.0)
        self._undo.close()


def blend(model: keras.Layer, reference: keras.Layer) -> list[Mix]:
    """Return every replaced layer with the reference's BatchNorm to mix in, in the order of the model.

    Raises `UnsupportedError` for a model without replaced layers and on the JAX backend, `InputError` for a reference
    without the BatchNorms.
    """
    found, known = replaced(model), dict(named_layers(reference))
    if not found:
        raise UnsupportedError("expected a patched model to blend, received one without replaced layers")
    if unfit := [name for name in found if not isinstance(known.get(name), BatchNorm)]:
        raise InputError(
            "expected a reference with the BatchNorms and running statistics of the model before the patch, "
            f"received one without them at {', '.join(unfit)}"
        )
    return [Mix(model, layer, known[name]) for name, layer in found.items()]
