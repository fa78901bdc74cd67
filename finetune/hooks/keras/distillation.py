"""What distillation computes with Keras models."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import keras
from keras import ops

from ...calibration.keras.layers import all_layers
from ..scores import logits, scores
from .hooks import replaced
from .statistics import INFERS, override

__all__ = ["all_layers", "distance", "divergence", "infer", "record", "replaced"]

Note = Callable[[str, Any, bool], None]


def record(model: keras.Layer, names: Iterable[str], note: Note) -> list[Callable[[], None]]:
    """Tell ``note`` what the named layers return, and whether it is learned from, and return what ends it."""
    layers = all_layers(model)

    def noting(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def call(*args: Any, **kwargs: Any) -> Any:
            output = run(*args, **kwargs)
            note(name, output, not INFERS.get())
            return output

        return call

    return [override(layers[name], "call", noting(name, layers[name].call)) for name in names]


def infer(teacher: keras.Layer, x: Any) -> Any:
    """Return the teacher's scores."""
    return ops.stop_gradient(scores(teacher(x, training=False)))


def divergence(output: Any, wanted: Any, temperature: float) -> Any:
    """Return T²·KL(wanted || output) of scores (N, ..., classes), which may be probabilities."""
    soft = (logits(ops.cast(each, "float32"), ops) / temperature for each in (output, wanted))
    student, teacher = (ops.log_softmax(each, axis=-1) for each in soft)
    return ops.mean(ops.sum(ops.exp(teacher) * (teacher - student), axis=-1)) * temperature**2


def distance(output: Any, wanted: Any) -> Any:
    """Return the mean squared distance over the variance of ``wanted``, where that varies."""
    output, wanted = ops.cast(output, "float32"), ops.stop_gradient(ops.cast(wanted, "float32"))
    var = ops.var(wanted)
    return ops.mean(ops.square(output - wanted)) / ops.where(var > 0, var, ops.ones_like(var))
