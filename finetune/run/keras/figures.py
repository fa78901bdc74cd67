"""What the figures of a fine-tuning are made of in a Keras model."""

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from ....frameworks.keras import distinct_layers, named_layers
from ....layers.keras import BatchRenormalization, SwitchNormalization
from ..contract import Gates, RenormStatistics
from ..training import Array


def gates(model: keras.Model) -> Gates:
    """Return the gates of every Switchable Normalization by name; see `normswap.finetune.run.figures.gates`."""
    found: dict[int, tuple[str, Any]] = {}
    for name, layer in named_layers(model):
        if isinstance(layer, SwitchNormalization) and layer.built:
            found.setdefault(id(layer), (name, layer))
    return {name: _pair(layer) for name, layer in found.values()}


def renorm_statistics(model: keras.Model) -> Callable[[], RenormStatistics | None]:
    """Return what reads the statistics of all Batch Renormalizations at once, None if there are none.

    Those with ``compat`` are left out: their moving average is another.
    """
    layers = [m for m in distinct_layers(model) if isinstance(m, BatchRenormalization) and m.built and m.compat is None]
    if not layers:
        return lambda: None
    number = np.repeat(np.arange(len(layers)), [m.moving_mean.shape[0] for m in layers])
    epsilon = np.array([m.epsilon for m in layers])[number]

    def read() -> RenormStatistics:
        r_max, d_max = (_joined(getattr(m, name) for m in layers)[number] for name in ("r_max", "d_max"))
        sigma = np.sqrt(_joined(m.moving_variance for m in layers) + epsilon)
        weight = np.array([1 - m.momentum for m in layers])[number]
        return RenormStatistics(_joined(m.moving_mean for m in layers), sigma, r_max, d_max, weight, number)

    return read


def _pair(layer: SwitchNormalization) -> tuple[Array, Array]:
    mean, var = (np.array(ops.convert_to_numpy(each)) for each in layer.gates())
    return mean, var


def _joined(variables: Iterable[Any]) -> Array:
    return np.concatenate([np.ravel(ops.convert_to_numpy(each)).astype(np.float64) for each in variables])
