"""What a drift measurement does with a Keras model."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from ...frameworks.keras import call, named_layers, watching
from ...layers.keras.statistics import wide
from ..measured_drift import See, outputs_of
from .swap import Swap


def watch(model: keras.Layer, example: Any, names: Collection[str], see: See) -> dict[str, NDArray[Any]]:
    """Run ``model``, telling ``see`` of each call of the named layers, and return its outputs by name."""
    layers = dict(named_layers(model))
    with watching({name: layers[name] for name in names}, lambda name, _, y: see(name, _array(y))):
        return {name: _array(y) for name, y in outputs_of(call(model, example))}


@contextmanager
def as_original(swaps: Sequence[Swap]) -> Iterator[None]:
    """Run the body with every replacement computing what its BatchNorm computes, and nothing else changed."""
    before = [swap.layer.__dict__.get("call") for swap in swaps]
    for swap in swaps:
        swap.layer.__dict__["call"] = _batch_norm(swap)
    try:
        yield
    finally:
        for swap, run in zip(swaps, before, strict=True):
            del swap.layer.__dict__["call"]
            swap.layer.__dict__.update({} if run is None else {"call": run})


def _batch_norm(swap: Swap) -> Callable[..., Any]:
    """Return what the BatchNorm that ``swap`` replaced computes at inference."""
    old, written = swap.old_contents, {id(variable): value for variable, value in swap.old_values}
    mean, var, gamma, beta = (
        None if (variable := old[name]) is None else written.get(id(variable), variable.numpy())
        for name in ("moving_mean", "moving_variance", "gamma", "beta")
    )

    def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        x = wide(inputs)
        y = ops.batch_normalization(x, mean, var, old["axis"], beta, gamma, old["epsilon"])
        return ops.cast(y, swap.layer.compute_dtype)

    return call


def _array(value: Any) -> NDArray[Any]:
    return np.asarray(ops.convert_to_numpy(wide(value)))
