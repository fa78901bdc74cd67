"""Walk a Keras model's layers, call it, and watch it being called."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import keras


def named_layers(model: keras.Layer) -> Iterator[tuple[str, keras.Layer]]:
    """Yield ``model`` under its own name and every layer below it, one held twice as often.

    A name below is the "/"-joined path of layer names; siblings of one name are told apart by "#2", "#3".
    """
    yield model.name, model
    yield from _below(model, "")


def distinct_layers(model: keras.Layer) -> list[keras.Layer]:
    """Return ``model`` and every layer below it once."""
    return list({id(layer): layer for _, layer in named_layers(model)}.values())


def call(model: keras.Layer, example: Any) -> Any:
    """Call ``model`` at inference on an example: an array, or a list or mapping of arrays."""
    if isinstance(getattr(model, "input", None), list) and not isinstance(example, list | tuple | Mapping):
        example = [example]  # as models of the older formats, whose single input is a list, expect it
    return model(example, training=False)


@contextmanager
def watching(watched: Mapping[Any, keras.Layer], observe: Callable[[Any, Any, Any], object]) -> Iterator[None]:
    """Run the body and tell ``observe(key, inputs, outputs)`` of every call of the watched layers.

    Wrappers that go past ``__call__``, such as `keras.layers.TimeDistributed`, are seen too.
    """
    before = {key: layer.__dict__.get("call") for key, layer in watched.items()}

    def spy(key: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = run(inputs, *args, **kwargs)
            observe(key, inputs, outputs)
            return outputs

        return call

    for key, layer in watched.items():
        layer.__dict__["call"] = spy(key, layer.call)
    try:
        yield
    finally:
        for key, layer in watched.items():
            del layer.__dict__["call"]
            layer.__dict__.update({} if before[key] is None else {"call": before[key]})


def _below(layer: keras.Layer, prefix: str) -> Iterator[tuple[str, keras.Layer]]:
    met: Counter[str] = Counter()
    for child in layer._layers:
        met[child.name] += 1
        path = f"{prefix}{child.name}" if met[child.name] == 1 else f"{prefix}{child.name}#{met[child.name]}"
        yield path, child
        yield from _below(child, f"{path}/")
