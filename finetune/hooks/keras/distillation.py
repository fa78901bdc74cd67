"""What distillation computes with Keras models."""

from typing import Any

import keras
import numpy as np
from keras import ops

from ..scores import Logits, scores
from .inference import INFERS, inference


def learns() -> bool:
    """Return whether what runs is to be learned from, and is no pass at inference."""
    return not INFERS.get()


def infer(model: keras.Layer, x: Any) -> Any:
    """Return the scores of a model at inference, without gradients."""
    with inference():
        return ops.stop_gradient(scores(model(x, training=False)))


def as_logits(scores: Any, known: Logits) -> Any:
    """Return the logits (N, ..., classes) of scores, which decide what is ``known`` where their values can be read."""
    narrow = keras.backend.standardize_dtype(scores.dtype) in ("float16", "bfloat16")
    wide = ops.cast(scores, "float32") if narrow else ops.convert_to_tensor(scores)
    if known.probabilities is None and _can_be_read(wide):
        known.decide(np.asarray(ops.convert_to_numpy(wide)))
    return known(wide, ops)


def divergence(output: Any, wanted: Any, temperature: float) -> Any:
    """Return T²·KL(wanted || output) of logits (N, ..., classes)."""
    student, teacher = (ops.log_softmax(ops.cast(each, "float32") / temperature, axis=-1) for each in (output, wanted))
    return ops.mean(ops.sum(ops.exp(teacher) * (teacher - student), axis=-1)) * temperature**2


def distance(output: Any, wanted: Any) -> Any:
    """Return the mean squared distance over the variance of ``wanted``, where that varies."""
    output, wanted = ops.cast(output, "float32"), ops.stop_gradient(ops.cast(wanted, "float32"))
    var = ops.var(wanted)
    return ops.mean(ops.square(output - wanted)) / ops.where(var > 0, var, ops.ones_like(var))


def _can_be_read(value: Any) -> bool:
    """Return whether a tensor holds values now, which one of a graph that is being traced does not."""
    if isinstance(value, keras.KerasTensor):
        return False
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return bool(tf.executing_eagerly())
    if keras.backend.backend() == "jax":
        import jax

        return not isinstance(value, jax.core.Tracer)
    import torch

    return value.device.type != "meta" and not torch.compiler.is_compiling()
