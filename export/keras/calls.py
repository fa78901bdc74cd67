"""The layers of a Keras model that own weights, and what each returns while the model is called."""

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import keras

from ...frameworks.keras import named_layers, watching
from ...layers.keras import BatchRenormalization, SwitchNormalization

_PER_CHANNEL = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    BatchRenormalization,
    SwitchNormalization,
)


def weighted_layers(model: Any) -> dict[str, Any]:
    """Return every layer that owns weights, once, by its path of layer names.

    A recurrent layer stands for its cell: a cell runs inside a loop, where no single value is its output.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    recurrent: tuple[str, ...] = ()
    for path, layer in named_layers(model):
        if id(layer) in seen or path.startswith(recurrent):
            continue
        seen.add(id(layer))
        if isinstance(layer, keras.layers.RNN):
            recurrent += (f"{path}/",)
        if isinstance(layer, keras.layers.RNN) or _owns_weights(layer):
            found[path] = layer
    return found


@contextmanager
def recording(model: Any) -> Iterator[dict[str, Any]]:
    """Collect the first tensor that each call of a weighted layer returns while the context is open.

    The names are the layers' paths, the second call of a layer is ``"name#2"``; the order is that of the calls.
    What convolutions and per-channel norms return is given as (N, C, ...), the layout it has in ONNX.
    """
    returned: dict[str, Any] = {}
    calls: Counter[str] = Counter()
    layers = weighted_layers(model)

    def observe(path: str, inputs: Any, outputs: Any) -> None:
        calls[path] += 1
        name = path if calls[path] == 1 else f"{path}#{calls[path]}"
        tensor = keras.tree.flatten(outputs)[0]
        last = len(tensor.shape) > 2 and _has_channels_last(layers[path], len(tensor.shape))
        returned[name] = keras.ops.moveaxis(tensor, -1, 1) if last else tensor

    with watching(layers, observe):
        yield returned


def _has_channels_last(layer: Any, rank: int) -> bool:
    if isinstance(layer, _PER_CHANNEL):
        return layer.axis in {-1, rank - 1}
    return getattr(layer, "data_format", None) == "channels_last"


def is_symbolic(tensor: Any) -> bool:
    """Whether ``tensor`` belongs to a graph under construction (the body of a loop) and has no value."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return bool(tf.is_symbolic_tensor(tensor))
    if keras.backend.backend() == "jax":
        import jax

        return isinstance(tensor, jax.core.Tracer)
    return False


def unique(name: str, taken: Collection[str | None]) -> str:
    """Return ``name``, or ``"name_2"`` and so on where it is taken."""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def _owns_weights(layer: Any) -> bool:
    inherited = {id(weight) for child in layer._layers for weight in child.weights}
    return any(id(weight) not in inherited for weight in layer.weights)
