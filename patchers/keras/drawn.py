"""Who reads what a layer returns, as the graph of a Functional or Sequential model draws it, on any backend.

Such a model runs nothing but its graph, in which every reader of a tensor is a node, so long as nobody's own code is in
it: that could read any layer of the model, its weights too, without a line being drawn.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import keras
from keras.src.models.functional import Functional

from ...frameworks.keras import distinct_layers

_PASSING = (
    *(keras.layers.Identity, keras.layers.Dropout, keras.layers.AlphaDropout, keras.layers.GaussianDropout),
    *(keras.layers.SpatialDropout1D, keras.layers.SpatialDropout2D, keras.layers.SpatialDropout3D),
)
"""Layers that return at inference what they are given."""


def foreign(model: keras.Layer) -> str:
    """Return the name of a class or function in the model that its graph does not tell all of; "" if it tells all."""
    for layer in distinct_layers(model):
        own = layer.__dict__.get("call", layer)
        if not _of_keras(layer) or not _of_keras(own) or isinstance(layer, keras.layers.Lambda):
            return type(layer).__name__
        for function in (getattr(layer, "activation", None), getattr(layer, "recurrent_activation", None)):
            if function is not None and not _of_keras(function):
                return getattr(function, "__name__", type(function).__name__)
    for node in (node for graph in _graphs(model) for node in _nodes(graph)):
        held = [] if isinstance(node.operation, keras.Layer) else list(vars(node.operation).values())
        given = keras.tree.flatten([node.arguments.args, node.arguments.kwargs])
        for thing in (node.operation, *filter(callable, (*held, *given))):  # as what `keras.ops.map` runs
            if not _of_keras(thing):
                return getattr(thing, "__name__", type(thing).__name__)
    return ""


def readers(model: keras.Layer) -> Iterator[tuple[Any, Any, list[Any]]]:
    """Yield of each call in the graphs within a model the operation, what it returns, and what reads that.

    A reader is an operation, past layers that pass on what they are given, or None for a graph's outputs.
    """
    for graph in _graphs(model):
        nodes = _nodes(graph)
        reading: dict[int, list[Any]] = {id(tensor): [None] for tensor in graph.outputs}
        for node in nodes:
            for tensor in node.input_tensors:
                reading.setdefault(id(tensor), []).append(node)
        for node in nodes:
            for tensor in node.outputs:
                yield node.operation, tensor, list(_read(tensor, reading))


def _read(tensor: Any, reading: Mapping[int, list[Any]]) -> Iterator[Any]:
    for node in reading.get(id(tensor), []):
        if node is not None and isinstance(node.operation, _PASSING):
            yield from _read(node.outputs[0], reading)
        else:
            yield node and node.operation


def _graphs(model: keras.Layer) -> Iterator[Any]:
    """Yield the graphs of a model and of those within."""
    for layer in distinct_layers(model):
        if isinstance(layer, Functional):
            yield layer
        elif isinstance(layer, keras.Sequential) and layer._functional is not None:
            yield layer._functional


def _nodes(graph: Any) -> list[Any]:
    return [node for nodes in graph._nodes_by_depth.values() for node in nodes]


def _of_keras(thing: Any) -> bool:
    """Return whether a function's code, or an object's class, is Keras's or ours."""
    module = getattr(thing, "__globals__", {}).get("__name__") or type(thing).__module__
    return module.partition(".")[0] in {"keras", "normswap"}
