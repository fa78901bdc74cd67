"""Compute what a graph computes of sizes, where those it needs are known, and drop cuts and paddings that do nothing.

Of a shape with an open batch TensorFlow computes even what the batch has no part in, as by how much the output of a
transposed convolution is to be cut or padded.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Sizes = NDArray[np.float64]
"""Integers, NaN for those that are open, which every operator hands on."""

_MOST = 64
"""Most numbers of a constant that may be sizes."""

_INTEGERS = ir.DataType.INT32, ir.DataType.INT64


def fold_sizes(graph: ir.Graph) -> None:
    """Make constants of what is computed of known sizes; take out each Slice and Pad that leaves all as it is.

    A Reshape to sizes of which one is open has -1 for that. The graph is sorted, the shapes of its values inferred.
    """
    known: dict[ir.Value, Sizes] = {}
    for node in list(graph):
        found = _computed(node, known)
        for output, sizes in zip(node.outputs, found, strict=False):
            known[output] = sizes
            if not np.isnan(sizes).any() and output.dtype is not None and not output.is_graph_output():
                constant = _constant_of(graph, sizes.astype(output.dtype.numpy()))
                known[constant] = sizes
                ir.convenience.replace_all_uses_with(output, constant)
        target = node.inputs[1] if node.op_type == "Reshape" else None
        shape = None if target is None else known.get(target)
        if shape is not None and np.isnan(shape).sum() == 1 and np.nanmin([*shape, 1]) > 0:
            node.replace_input_with(1, _constant_of(graph, np.nan_to_num(shape, nan=-1).astype(np.int64)))
        source = node.inputs[0] if node.inputs else None
        if source is not None and not node.outputs[0].is_graph_output() and _does_nothing(node):
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
    for node in reversed(graph):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)


def _constant_of(graph: ir.Graph, array: NDArray[np.integer]) -> ir.Value:
    """Return a constant of sizes, named after them."""
    name = "_".join(["sizes", array.dtype.name, *map(str, array.reshape(-1))])
    name = f"{name}{'' if array.ndim else '_scalar'}"
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]


def _computed(node: ir.Node, known: dict[ir.Value, Sizes]) -> list[Sizes]:
    """Return what a node computes of sizes, nothing where it does not, or needs more than is known."""
    if node.op_type == "Shape" and node.inputs[0] is not None and (shape := node.inputs[0].shape) is not None:
        sizes = np.array([size if isinstance(size, int) else np.nan for size in shape], np.float64)
        start, end = (node.attributes.get(part) for part in ("start", "end"))
        return [sizes[slice(start and start.as_int(), end and end.as_int())]]
    operands = [known.get(value, _constant(value)) if value is not None else None for value in node.inputs]
    if node.op_type not in _WAYS or node.domain != "" or any(operand is None for operand in operands):
        return []
    given = [operand for operand in operands if operand is not None]
    if any(np.isnan(operand).any() for operand in given[1:]) and node.op_type not in _OF_ALL:
        return []
    try:
        return _WAYS[node.op_type](node, given)
    except (ValueError, IndexError):  # what are no sizes, but has their numbers
        return []


def _sliced(node: ir.Node, given: list[Sizes]) -> list[Sizes]:
    sizes, starts, ends, *rest = given
    (start,), (end,), (step,) = (_integers(part) for part in (starts, ends, rest[1] if len(rest) > 1 else np.ones(1)))
    return [sizes[start:end:step]]


def _squeezed(node: ir.Node, given: list[Sizes]) -> list[Sizes]:
    return [given[0].reshape(())] if given[0].ndim == 1 else []


def _unsqueezed(node: ir.Node, given: list[Sizes]) -> list[Sizes]:
    return [given[0].reshape(1)] if given[0].ndim == 0 else []


def _split(node: ir.Node, given: list[Sizes]) -> list[Sizes]:
    parts = np.cumsum(_integers(given[1]))[:-1] if len(given) > 1 else len(node.outputs)
    return list(np.split(given[0], parts))


def _cast(node: ir.Node, given: list[Sizes]) -> list[Sizes]:
    return given[:1] if node.attributes["to"].as_int() in _INTEGERS else []


_OF_ALL = ("Add", "Concat", "Div", "Max", "Min", "Mul", "Sub")
"""What hands on all that it is given; of other nodes all but the first input says how."""

_WAYS: dict[str, Callable[[ir.Node, list[Sizes]], list[Sizes]]] = {
    "Add": lambda node, given: [given[0] + given[1]],
    "Cast": _cast,
    "Concat": lambda node, given: [np.concatenate(given)],
    "Div": lambda node, given: [np.trunc(given[0] / given[1])],
    "Gather": lambda node, given: [given[0][_integers(given[1])]],
    "Max": lambda node, given: [np.maximum.reduce(np.broadcast_arrays(*given))],
    "Min": lambda node, given: [np.minimum.reduce(np.broadcast_arrays(*given))],
    "Mul": lambda node, given: [given[0] * given[1]],
    "Neg": lambda node, given: [-given[0]],
    "Slice": _sliced,
    "Split": _split,
    "Squeeze": _squeezed,
    "Sub": lambda node, given: [given[0] - given[1]],
    "Unsqueeze": _unsqueezed,
}


def _does_nothing(node: ir.Node) -> bool:
    """Whether a node is a Slice of all there is, or a Pad by nothing."""
    operands = [None if value is None else _constant(value) for value in node.inputs[1:]]
    if node.op_type == "Pad":
        return operands[0] is not None and not operands[0].any()
    shape = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
    if node.op_type != "Slice" or shape is None or any(operand is None for operand in operands):
        return False
    starts, ends, *rest = (_integers(operand) for operand in operands if operand is not None)
    axes = rest[0] if rest else np.arange(len(starts))
    steps = rest[1] if len(rest) > 1 else np.ones(len(starts))
    sizes = [shape[int(axis)] for axis in axes]
    whole = all(isinstance(size, int) and end >= size for size, end in zip(sizes, ends, strict=True))
    return whole and not starts.any() and bool((steps == 1).all())


def _integers(sizes: Sizes) -> NDArray[np.int64]:
    return np.clip(sizes, -(2**53), 2**53).astype(np.int64)  # what stands for any end is more


def _constant(value: ir.Value) -> Sizes | None:
    """Return a constant that may be sizes: a number or a few in a row."""
    tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
    if tensor is None or len(tensor.shape) > 1 or tensor.size > _MOST or tensor.dtype not in _INTEGERS:
        return None
    return tensor.numpy().astype(np.float64)
