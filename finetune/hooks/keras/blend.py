"""Replaced layers of a Keras model with a share of the BatchNorm that was there."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from typing import Any

import keras
from keras import ops

from ....convert.equalize import affine_since
from ....errors import InputError, UnsupportedError
from ....frameworks.keras import named_layers, override
from ....layers.keras.statistics import wide
from ....patchers.keras.fronts import channels_of, front_weights
from ....patchers.keras.swap import FRONT, BatchNorm, read_state
from .layers import replaced
from .tracing import retrace, share

Fronts = tuple[keras.Layer, keras.Layer]
"""The layer in front of a norm, in the model and in the reference."""


class Mix:
    """A replaced layer, while a frozen BatchNorm has a share in its output."""

    def __init__(self, model: keras.Layer, layer: keras.Layer, norm: keras.Layer, fronts: Fronts | None) -> None:
        parts = (norm.moving_mean, norm.moving_variance, norm.gamma, norm.beta)
        self._mean, self._var, self._gamma, self._beta = (
            None if part is None else ops.convert_to_numpy(part) for part in parts
        )
        self._model, self._layer, self._axis, self._epsilon = model, layer, norm.axis, norm.epsilon
        self._affine = None if fronts is None else affine_since(read_state(norm), *map(front_weights, reversed(fronts)))
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
            before = self._before(wide(inputs))
            part = ops.cast(self._share, output.dtype)
            return (1 - part) * output + part * ops.cast(before, output.dtype)

        return call

    def _before(self, x: Any) -> Any:
        """Return what the BatchNorm computes, of an equalized input where the layer in front has taken a scale."""
        if self._affine is None:
            return ops.batch_normalization(x, self._mean, self._var, self._axis, self._beta, self._gamma, self._epsilon)
        shape = [1] * len(x.shape)
        shape[self._axis] = -1
        scale, shift = (ops.convert_to_tensor(each.reshape(shape), x.dtype) for each in self._affine)
        return ops.add(ops.multiply(x, scale), shift)

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
    mine = dict(named_layers(model))
    return [Mix(model, layer, known[name], _fronts(name, layer, mine, known)) for name, layer in found.items()]


def _fronts(
    name: str, layer: keras.Layer, mine: Mapping[str, keras.Layer], known: Mapping[str, keras.Layer]
) -> Fronts | None:
    """Return the layer in front that is equalized for a norm, in the model and in the reference, None for no such."""
    front = layer.__dict__.get(FRONT)
    if front is None:
        return None
    pair = mine.get(front), known.get(front)
    if not all(map(channels_of, pair)) or front_weights(pair[0])[0].shape != front_weights(pair[1])[0].shape:
        raise InputError(
            f"expected a reference with the layer {front} that is equalized for {name}, received one without it"
        )
    return pair
