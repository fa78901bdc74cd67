"""Find the BatchNorms of a Keras model and judge what stands in the way of replacing each."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import keras

from ...convert.targets import BatchRenorm, SwitchNorm
from ...errors import said, spoken
from ...frameworks.example import not_taken
from ...frameworks.keras import Shape, build_shape, call, distinct_layers, inference, named_layers, override, watching
from ...layers import keras as layers
from ..plan import Site
from .swap import MARK, BatchNorm

_KINDS = {layers.SwitchNormalization: SwitchNorm.kind, layers.BatchRenormalization: BatchRenorm.kind}


def find_sites(model: keras.Layer, example: Any = None) -> tuple[list[keras.Layer], list[Site]]:
    """Return the BatchNorm layers of ``model``, patched ones included, and what is known of each.

    Shapes come from a dry run on ``example``, or from what each layer was built for where that is all known. What is
    not built is built on the example first, since it may hold layers only then.
    """
    if example is not None and not all(layer.built for layer in distinct_layers(model)):
        _dry_run(model, {}, example)
    names: dict[int, list[str]] = {}
    found: dict[int, keras.Layer] = {}
    for name, layer in named_layers(model):
        if isinstance(layer, BatchNorm) or _kind(layer) is not None:
            names.setdefault(id(layer), []).append(name)
            found[id(layer)] = layer
    by_the_batch = {key for key, layer in found.items() if _drawn_for_training(layer)}
    masked: set[int] = set()
    seen: dict[int, Shape] = {}
    if example is not None:
        with _noting(found, by_the_batch, masked):
            seen = _dry_run(model, found, example)
    sites = []
    for key, layer in found.items():
        shape = build_shape(layer)
        sites.append(
            Site(
                name=names[key][0],
                aliases=tuple(names[key][1:]),
                source=type(layer).__name__,
                channels=0 if shape is None else int(shape[layer.axis]),
                spatial=_spatial(seen.get(key, shape), layer.axis),
                obstacle=_obstacle(layer, shape),
                kind=_kind(layer),
                by_the_batch=key in by_the_batch and layer.trainable,
                masked_by="a mask" if key in masked else "",
            )
        )
    return list(found.values()), sites


def _kind(layer: keras.Layer) -> str | None:
    return layer.__dict__.get(MARK) or _KINDS.get(type(layer))


def _obstacle(layer: keras.Layer, shape: Shape | None) -> str:
    if _kind(layer) is not None:
        return ""
    if type(layer).call is not BatchNorm.call or "call" in layer.__dict__:
        return f"{type(layer).__name__} overrides call: a replacement would lose what it adds"
    if shape is None:
        return f"not built yet: {spoken('give --input-shape', 'give an example input, or call the model on one first')}"
    if layer.axis % len(shape) == 0:
        return f"it normalizes along the batch (axis={layer.axis})"
    return ""


def _drawn_for_training(layer: keras.Layer) -> bool:
    """Return whether a graph gives a layer ``training=True``."""
    return any(node.arguments.kwargs.get("training") is True for node in layer._inbound_nodes)


@contextmanager
def _noting(layers: Mapping[int, keras.Layer], trained: set[int], masked: set[int]) -> Iterator[None]:
    """Note which of the layers are called with ``training=True``, and which with a mask, within the context."""

    def spy(key: int, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("training") is True:
                trained.add(key)
            if kwargs.get("mask") is not None:
                masked.add(key)
            return run(inputs, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for key, layer in layers.items():
            stack.callback(override(layer, "call", partial(spy, key)))
        yield


def _spatial(shape: Shape | None, axis: int) -> tuple[int, ...] | None:
    """Return the sizes of ``shape`` but batch and channels, None where one of them is unknown."""
    if shape is None:
        return None
    sizes = [size for i, size in enumerate(shape) if i not in (0, axis % len(shape))]
    return None if None in sizes else tuple(size for size in sizes if size is not None)


def _dry_run(model: keras.Layer, watched: Mapping[int, keras.Layer], example: Any) -> dict[int, Shape]:
    seen: dict[int, Shape] = {}
    try:
        with (
            inference(model, compiled=False),
            watching(watched, lambda key, x, _: seen.setdefault(key, tuple(x.shape))),
        ):
            call(model, example)
    except Exception as error:
        raise not_taken(said(error)) from error
    return seen
