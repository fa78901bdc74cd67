"""What distillation computes with Keras models."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import keras
from keras import ops

from .helpers import override
from .hooks import replaced
from .sites import all_layers

__all__ = ["all_layers", "distance", "divergence", "infer", "logits", "record", "replaced"]

_LEAST_PROBABILITY = 1e-30
_SUM_TOLERANCE = 1e-3


def record(model: keras.Layer, names: Iterable[str], outputs: dict[str, Any]) -> list[Callable[[], None]]:
    """Write what the named layers return into ``outputs`` from now on, and return what ends it."""
    layers = all_layers(model)

    def noting(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def call(*args: Any, **kwargs: Any) -> Any:
            outputs[name] = run(*args, **kwargs)
            return outputs[name]

        return call

    return [override(layers[name], "call", noting(name, layers[name].call)) for name in names]


def infer(teacher: keras.Layer, x: Any) -> Any:
    """Return the teacher's output."""
    return ops.stop_gradient(teacher(x, training=False))


def divergence(output: Any, wanted: Any, temperature: float) -> Any:
    """Return T²·KL(wanted || output) of scores (N, ..., classes), which may be probabilities."""
    student, teacher = (ops.log_softmax(logits(each) / temperature, axis=-1) for each in (output, wanted))
    return ops.mean(ops.sum(ops.exp(teacher) * (teacher - student), axis=-1)) * temperature**2


def distance(output: Any, wanted: Any) -> Any:
    """Return the mean squared distance over the variance of ``wanted``, where that varies."""
    output, wanted = ops.cast(output, "float32"), ops.stop_gradient(ops.cast(wanted, "float32"))
    var = ops.var(wanted)
    return ops.mean(ops.square(output - wanted)) / ops.where(var > 0, var, ops.ones_like(var))


def logits(scores: Any) -> Any:
    """Return logits for scores that may be probabilities.

    The logarithm of a softmax is its logits but for a constant, which neither loss nor temperature sees.
    """
    scores = ops.cast(scores, "float32")
    whole = ops.all(ops.abs(ops.sum(scores, axis=-1) - 1) < _SUM_TOLERANCE)
    shares = ops.logical_and(ops.all(scores >= 0), whole)
    return ops.where(shares, ops.log(ops.maximum(scores, _LEAST_PROBABILITY)), scores)
