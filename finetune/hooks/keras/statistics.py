"""What a training loop of one's own needs at once with Keras: the re-estimation of statistics."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any

import keras
import numpy as np
from keras import ops

from ....errors import InputError, UnsupportedError
from ....frameworks.keras import call, distinct_layers
from ....layers.keras.norm import MovingNorm
from ....layers.keras.statistics import wide
from ...calibration.least_squares import Moments

INFERS = ContextVar("infers", default=False)
"""Whether what runs is within `inference`."""


@contextmanager
def inference() -> Iterator[None]:
    """Run the body without gradients, and without a `Distillation` taking note of it."""
    token = INFERS.set(True)
    try:
        with _without_gradients():
            yield
    finally:
        INFERS.reset(token)


def moving_layers(model: keras.Layer) -> list[keras.Layer]:
    """Return every SN and BRN that keeps moving statistics; those that are not trainable do not."""
    found = [layer for layer in distinct_layers(model) if isinstance(layer, MovingNorm) and layer.trainable]
    return [layer for layer in found if getattr(layer, "batch_statistics", "moving") == "moving"]


def update_statistics(model: keras.Layer, batches: Iterable[Any]) -> None:
    """Re-estimate the moving statistics of every SN and BRN on ``batches``, in place of their moving averages.

    Mean and variance become those of all the values a layer saw, each batch weighted by its count, while the layers
    normalize by the batch, without BRN's correction towards what is to be replaced; all else runs as at inference.
    Masked positions take no part. ``batches`` are inputs as the model takes them, or pairs whose first part is.

    Raises `UnsupportedError` if the model has no such layer, `InputError` if there are no batches.
    """
    layers = moving_layers(model)
    if not layers:
        raise UnsupportedError(
            "expected a model with SN or BRN layers that keep moving statistics, received one without"
        )
    kept = [tuple(np.array(ops.convert_to_numpy(part)) for part in (m.moving_mean, m.moving_variance)) for m in layers]
    seen = [Moments() for _ in layers]
    undo = [override(m, "call", _by_the_batch(m, moments)) for m, moments in zip(layers, seen, strict=True)]
    try:
        for batch in batches:
            with inference():
                call(model, batch[0] if isinstance(batch, tuple) else batch)
        if any(moments.count == 0 for moments in seen):
            raise InputError("expected batches that reach every layer, received none for some")
    except BaseException:
        for m, (mean, var) in zip(layers, kept, strict=True):
            m.moving_mean.assign(mean)
            m.moving_variance.assign(var)
        raise
    finally:
        for restore in undo:
            restore()
    for m, moments in zip(layers, seen, strict=True):
        _set_statistics(m, moments)


def override(layer: keras.Layer, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Put ``method`` in place of one of the layer's own, and return what takes it away again."""
    before = layer.__dict__.get(name)
    layer.__dict__[name] = method

    def undo() -> None:
        del layer.__dict__[name]
        layer.__dict__.update({} if before is None else {name: before})

    return undo


def _without_gradients() -> Any:
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return nullcontext()


def _by_the_batch(layer: keras.Layer, moments: Moments) -> Callable[..., Any]:
    """Return the layer's call, but by the statistics of what it is given, which are counted, too."""
    run = layer.call

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
