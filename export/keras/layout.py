"""Take the changes of layout out of a graph: Keras computes channels last, ONNX channels first.

A Transpose is moved behind every operator that works in either layout, until it meets one that undoes it.
"""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Perm = tuple[int, ...]

_ELEMENTWISE = {
    *("Abs", "Add", "Cast", "Ceil", "Clip", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish"),
    *("Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu"),
    *("Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Tanh", "ThresholdedRelu", "Where"),
}
_REDUCTIONS = {"ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"}


def sink_transposes(graph: ir.Graph, fixed: Collection[ir.Node]) -> None:
    """Move each Transpose down the graph, past all but the nodes in ``fixed``, and drop those that do nothing.

    One behind a Reshape that only moves axes of size 1 becomes part of it.
    """
    graph.sort()
    for node in list(graph):
        if node.op_type == "Reshape" and (perm := _as_perm(node)) is not None:
            _put(graph, node, ir.node("Transpose", [_source(node)], {"perm": perm}, name=node.name))
    for node in list(graph):
        if _permutes(node) and not node.outputs[0].is_graph_output():
            _merge(graph, node)
        elif node not in fixed and node.domain == "" and (way := _WAYS.get(node.op_type)) is not None:
            perm = _common_perm(node)
            if perm is not None:
                way(graph, node, perm)
    for node in reversed(graph):
        if node.op_type in {"Transpose", "Reshape"} and not _needed(node):
            graph.remove(node, safe=True)


def _as_perm(reshape: ir.Node) -> Perm | None:
    """Return the permutation that a Reshape stands for, as of maps of size 1, None where it is no change of layout."""
    shape, target = _source(reshape).shape, _array(reshape.inputs[1])
    if shape is None or target is None or len(shape) != len(target) or len(shape) < 3:
        return None
    before, after = list(shape)[1:], target.tolist()[1:]
    if before == after:
        return tuple(range(len(shape)))
    ones = [1] * (len(before) - 1)
    if before == [*ones, after[0]] and after[1:] == ones:
        return (0, len(before), *range(1, len(before)))
    if before == [after[-1], *ones] and after[:-1] == ones:
        return (0, *range(2, len(before) + 1), 1)
    return None


def _merge(graph: ir.Graph, node: ir.Node) -> None:
    """Make one Transpose of two in a row, or nothing if the second undoes the first."""
    inner = _source(node)
    producer = inner.producer()
    perm = _perm(node)
    if producer is not None and _permutes(producer):
        inner, perm = _source(producer), tuple(_perm(producer)[axis] for axis in perm)
    if perm == tuple(sorted(perm)):
        ir.convenience.replace_all_uses_with(node.outputs[0], inner)
        return
    base = inner.producer()
    if base is not None and base.op_type == "Reshape" and (sizes := _moved_ones(inner, perm)) is not None:
        shape = _constant(graph, f"{node.outputs[0].name}/shape", np.array([-1, *sizes], np.int64))
        new = ir.node("Reshape", [_source(base), shape], name=node.name)
    else:
        new = ir.node("Transpose", [inner], {"perm": perm}, name=node.name)
    _put(graph, node, new)


def _moved_ones(value: ir.Value, perm: Perm) -> list[int] | None:
    """Return the sizes behind the batch after ``perm``, or None unless it only moves axes of size 1."""
    if value.shape is None or perm[0] != 0:
        return None
    sizes = [size for axis in perm[1:] if isinstance(size := value.shape[axis], int)]
    order = [axis for axis in perm[1:] if value.shape[axis] != 1]
    return sizes if len(sizes) == len(perm) - 1 and order == sorted(order) else None


def _past_elementwise(graph: ir.Graph, node: ir.Node, perm: Perm) -> None:
    for index, value in enumerate(node.inputs):
        if value is None or _is_transpose(value):
            continue
        array = _array(value)
        assert array is not None
        if array.size > 1:
            full = array.reshape((1,) * (len(perm) - array.ndim) + array.shape)
            moved = np.ascontiguousarray(full.transpose(np.argsort(perm)))
            node.replace_input_with(index, _constant(graph, f"{value.name}/channels_first", moved))
    _pass(graph, node, perm)


def _past_concat(graph: ir.Graph, node: ir.Node, perm: Perm) -> None:
    axis = node.attributes["axis"].as_int()
    node.attributes["axis"] = ir.AttrInt64("axis", perm[axis])
    _pass(graph, node, perm)


def _past_pad(graph: ir.Graph, node: ir.Node, perm: Perm) -> None:
    pads = _array(node.inputs[1])
    if pads is None or (len(node.inputs) > 3 and node.inputs[3] is not None):
        return
    moved = pads.reshape(2, -1)[:, np.argsort(perm)].reshape(-1)
    node.replace_input_with(1, _constant(graph, f"{node.outputs[0].name}/pads", moved))
    _pass(graph, node, perm)


def _past_reduction(graph: ir.Graph, node: ir.Node, perm: Perm) -> None:
    attribute = node.attributes.get("axes")
    given = list(attribute.as_ints()) if attribute is not None else None
    if given is None and len(node.inputs) > 1 and (array := _array(node.inputs[1])) is not None:
        given = array.tolist()
    if given is None:
        return
    axes = sorted(perm[axis] for axis in given)
    if attribute is not None:
        node.attributes["axes"] = ir.AttrInt64s("axes", axes)
    else:
        name = f"{node.outputs[0].name}/axes"
        node.replace_input_with(1, _constant(graph, name, np.array(axes, np.int64)))
    keep = node.attributes.get("keepdims")
    if keep is None or keep.as_int():
        _pass(graph, node, perm)
        return
    left = [axis for axis in perm if axis not in axes]
    _pass(graph, node, tuple(sorted(left).index(axis) for axis in left))


_WAYS: dict[str, Callable[[ir.Graph, ir.Node, Perm], None]] = {
    **dict.fromkeys(_ELEMENTWISE, _past_elementwise),
    **dict.fromkeys(_REDUCTIONS, _past_reduction),
    "Concat": _past_concat,
    "Pad": _past_pad,
}


def _common_perm(node: ir.Node) -> Perm | None:
    """Return the permutation that all inputs of ``node`` have undergone but for constants, if it is one."""
    perms = set()
    for value in node.inputs:
        if value is not None and _is_transpose(value):
            perms.add(_perm(value.producer()))
        elif value is not None and _array(value) is None:
            return None
    return perms.pop() if len(perms) == 1 else None


def _pass(graph: ir.Graph, node: ir.Node, perm: Perm) -> None:
    """Let ``node`` work on what its inputs were before their Transpose, which then follows it."""
    for index, value in enumerate(node.inputs):
        if value is not None and _is_transpose(value):
            node.replace_input_with(index, _source(value.producer()))
    old = node.outputs[0]
    if perm == tuple(sorted(perm)):
        return
    new = ir.node(node.op_type, node.inputs, node.attributes, name=node.name)
    back = ir.node("Transpose", [new.outputs[0]], {"perm": perm}, name=f"{node.name}/channels_last")
    new.outputs[0].type = back.outputs[0].type = old.type
    back.outputs[0].shape = old.shape
    if old.shape is not None:
        new.outputs[0].shape = ir.Shape([old.shape[perm.index(axis)] for axis in range(len(perm))])
    name = old.name
    new.outputs[0].name = f"{name}/channels_first"
    ir.convenience.replace_nodes_and_values(graph, node, [node], [new, back], [old], [back.outputs[0]])
    back.outputs[0].name = name


def _put(graph: ir.Graph, node: ir.Node, new: ir.Node) -> None:
    """Put ``new`` in the place of ``node``."""
    old, value = node.outputs[0], new.outputs[0]
    name, value.shape, value.type = old.name, old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], [new], [old], [value])
    value.name = name


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    known = graph.initializers.get(name)
    if known is not None and (old := _array(known)) is not None and np.array_equal(old, array):
        return known
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _array(value: ir.Value | None) -> NDArray[Any] | None:
    tensor = None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _is_transpose(value: ir.Value) -> bool:
    return _permutes(value.producer())


def _permutes(node: ir.Node | None) -> bool:
    """Whether a node is a Transpose that says how; one of unknown rank does not."""
    return node is not None and node.op_type == "Transpose" and "perm" in node.attributes


def _needed(node: ir.Node) -> bool:
    return any(value.uses() or value.is_graph_output() for value in node.outputs)


def _source(node: ir.Node | None) -> ir.Value:
    assert node is not None
    value = node.inputs[0]
    assert value is not None
    return value


def _perm(node: ir.Node | None) -> Perm:
    assert node is not None
    return tuple(node.attributes["perm"].as_ints())
