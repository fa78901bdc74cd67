"""What a Keras model is trained for: labels, or the model before the patch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops

from ...hooks.distillation import Distillation
from ...hooks.keras.distillation import as_logits, infer
from ...hooks.scores import Logits, class_count
from ..training import Array, Training

Criterion = Callable[[Any, Any, Any], Any]
"""The loss as a function of inputs, labels and scores."""


@contextmanager
def criterion(
    model: keras.Model, teacher: keras.Model | None, training: Training, images: Array
) -> Iterator[Criterion]:
    """Yield the loss; the scores of ``images`` decide whether a model returns probabilities.

    Raises `UnsupportedError` for labels without scores (N, classes).
    """
    if teacher is not None:
        with Distillation(model, teacher, training.temperature, training.features) as distillation:
            distillation.decide(ops.convert_to_tensor(images))
            yield lambda x, labels, output: distillation(x, output)
        return
    known = Logits()
    found = infer(model, ops.convert_to_tensor(images))
    class_count(found)
    as_logits(found, known)
    yield lambda x, labels, output: ops.mean(
        keras.losses.sparse_categorical_crossentropy(labels, known(ops.cast(output, "float32"), ops), from_logits=True)
    )
