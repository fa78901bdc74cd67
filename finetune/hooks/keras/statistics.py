"""The moving statistics of a Keras model, measured anew."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any

import keras
import numpy as np
from keras import ops

from ....errors import InputError, UnsupportedError
from ....frameworks.keras import call, distinct_layers, override
from ....layers.keras.norm import MovingNorm
from ....layers.keras.statistics import wide
from ...calibration.least_squares import Moments
from .inference import inference


def moving_layers(model: keras.Layer) -> list[keras.Layer]:
    """Return every SN, BRN and BatchNorm that keeps moving statistics; those that are not trainable do not."""
    found = [m for m in distinct_layers(model) if isinstance(m, MovingNorm | keras.layers.BatchNormalization)]
    return [m for m in found if m.trainable and getattr(m, "batch_statistics", "moving") == "moving"]


def update_statistics(model: keras.Layer, batches: Iterable[Any]) -> Callable[[], None]:
    """Re-estimate the moving statistics of every SN, BRN and BatchNorm; see `normswap.finetune.update_statistics`."""
    layers = moving_layers(model)
    if not layers:
        raise UnsupportedError(
            "expected a model with SN, BRN or BatchNorm layers that keep moving statistics, received one without"
        )
    kept = [tuple(np.array(ops.convert_to_numpy(part)) for part in (m.moving_mean, m.moving_variance)) for m in layers]
    seen = [Moments() for _ in layers]

    def undo() -> None:
        for m, (mean, var) in zip(layers, kept, strict=True):
            m.moving_mean.assign(mean)
            m.moving_variance.assign(var)

    try:
        with ExitStack() as overridden:
            for m, moments in zip(layers, seen, strict=True):
                overridden.callback(override(m, "call", partial(_by_the_batch, m, moments)))
            for batch in batches:
                with inference():
                    call(model, batch[0] if isinstance(batch, tuple) else batch)
        if any(moments.count == 0 for moments in seen):
            raise InputError("expected batches that reach every layer, received none for some")
    except BaseException:
        undo()
        raise
    for m, moments in zip(layers, seen, strict=True):
        _set_statistics(m, moments)
    return undo


def _by_the_batch(layer: keras.Layer, moments: Moments, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return the layer's call, but by the statistics of what it is given, which are counted, too."""

    @wraps(run)
    def call(inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        rows = np.moveaxis(np.asarray(ops.convert_to_numpy(wide(inputs))), layer.axis, -1)
        batch = Moments()
        batch.add(rows if mask is None else rows[ops.convert_to_numpy(mask).astype(bool)])
        moments.merge(batch.count, batch.mean, batch.var)
        _set_statistics(layer, batch)
        return run(inputs, training=False, mask=mask)

    return call


def _set_statistics(layer: keras.Layer, moments: Moments) -> None:
    layer.moving_mean.assign(moments.mean)
    layer.moving_variance.assign(moments.var)
