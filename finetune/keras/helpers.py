"""What a training loop of one's own needs at once with Keras: the re-estimation of statistics."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import keras
import numpy as np
from keras import ops

from ...errors import InputError, UnsupportedError
from ...layers.keras.norm import MovingNorm
from ...layers.keras.statistics import wide
from ...patchers.keras_walk import call, distinct_layers
from ..least_squares import Moments


def moving_layers(model: keras.Layer) -> list[keras.Layer]:
    """Return every SN and BRN that keeps moving statistics; those that are not trainable do not."""
    found = [layer for layer in distinct_layers(model) if isinstance(layer, MovingNorm) and layer.trainable]
    return [layer for layer in found if getattr(layer, "batch_statistics", "moving") == "moving"]


def update_statistics(model: keras.Layer, batches: Iterable[Any]) -> None:
    """Re-estimate the moving statistics of every SN and BRN on ``batches``, in place of their moving averages.

    Mean and variance become those of all the values a layer saw, each batch weighted by its count, while the layers
    normalize by the batch as in training; all else runs as at inference. Masked positions take no part. ``batches``
    are inputs as the model takes them, or pairs whose first part is.

    Raises `UnsupportedError` if the model has no such layer, `InputError` if there are no batches.
    """
    layers = moving_layers(model)
    if not layers:
        raise UnsupportedError(
            "expected a model with SN or BRN layers that keep moving statistics, received one without"
        )
    kept = [[(variable, np.array(ops.convert_to_numpy(variable))) for variable in m.variables] for m in layers]
    seen = [Moments() for _ in layers]
    undo = [override(m, "call", _training(m, moments)) for m, moments in zip(layers, seen, strict=True)]
    try:
        for batch in batches:
            call(model, batch[0] if isinstance(batch, tuple) else batch)
    finally:
        for restore in undo:
            restore()
        for variables in kept:
            for variable, value in variables:
                variable.assign(value)
    if any(moments.count == 0 for moments in seen):
        raise InputError("expected batches that reach every layer, received none for some")
    for m, moments in zip(layers, seen, strict=True):
        m.moving_mean.assign(moments.mean)
        m.moving_variance.assign(moments.var)


def override(layer: keras.Layer, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Put ``method`` in place of one of the layer's own, and return what takes it away again."""
    before = layer.__dict__.get(name)
    layer.__dict__[name] = method

    def undo() -> None:
        del layer.__dict__[name]
        layer.__dict__.update({} if before is None else {name: before})

    return undo


def _training(layer: keras.Layer, moments: Moments) -> Callable[..., Any]:
    """Return the layer's call as in training, which also takes down the moments of what it is given."""
    run = layer.call

    @wraps(run)
    def call(inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        rows = np.moveaxis(np.asarray(ops.convert_to_numpy(wide(inputs))), layer.axis, -1)
        moments.add(rows if mask is None else rows[ops.convert_to_numpy(mask).astype(bool)])
        return run(inputs, training=True, mask=mask)

    return call
