"""A file in float16, whose norms are computed in float32.

The mean of squares of a map passes float16's largest number, 65,504, as soon as its values pass 256.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass
from onnxruntime.transformers.float16 import ALWAYS_FLOAT_INPUTS, DEFAULT_OP_BLOCK_LIST

from ..errors import UnsupportedError, option

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
SUBGRAPHS = ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS
LARGEST = float(np.finfo(np.float16).max)


def to_half(model: ir.Model, norms: Collection[str]) -> None:
    """Store weights and compute in float16, in place, but for the nodes of ``norms``, named ``LAYER/PART``.

    A Cast stands before and after each norm and each operator that has no float16. Inputs and outputs keep their
    types. Raises `UnsupportedError` for a weight beyond float16 and for control flow.
    """
    if nested := [node.op_type for node in model.graph if any(a.type in SUBGRAPHS for a in node.attributes.values())]:
        raise UnsupportedError(
            f"expected a model without control flow for float16, received one with {nested[0]}; leave "
            f"{option('half')} out"
        )
    ShapeInferencePass()(model)
    wide = {
        node
        for node in model.graph
        if node.op_type in DEFAULT_OP_BLOCK_LIST or str(node.name).rpartition("/")[0] in norms
    }
    for node in model.graph:
        if node not in wide:
            _narrow(node)
    for value in list(model.graph.initializers.values()):
        if value.dtype == FLOAT:
            _narrow_weight(model.graph, value, wide)
    casts = _Casts(model.graph)
    for node in list(model.graph):
        for index, taken in enumerate(node.inputs):
            wanted = FLOAT if _takes_float(node, index, wide) else HALF
            if taken is not None and taken.dtype in (FLOAT, HALF) and taken.dtype != wanted:
                node.replace_input_with(index, casts.of(taken, wanted))
    for index, output in enumerate(model.graph.outputs):
        if output.dtype == HALF:
            name, output.name = output.name, f"{output.name}.half"
            model.graph.outputs[index] = casts.of(output, FLOAT)
            model.graph.outputs[index].name = name


class _Casts:
    """One Cast for each value and type that asks for one."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def of(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return ``value`` as ``dtype``."""
        if (value, dtype) not in self._made:
            name = f"{value.name}.{'half' if dtype == HALF else 'float'}"
            node = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
            node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, ir.TensorType(dtype)
            producer = value.producer()
            if producer is None:
                self._graph.insert_before(self._graph[0], node)
            else:
                self._graph.insert_after(producer, node)
            self._made[value, dtype] = node.outputs[0]
        return self._made[value, dtype]


def _narrow(node: ir.Node) -> None:
    """Let a node compute in float16."""
    for output in node.outputs:
        if output.dtype == FLOAT:
            output.dtype = HALF
    if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(HALF))
    fill = node.attributes.get("value") if node.op_type == "ConstantOfShape" else None
    if fill is not None and fill.as_tensor().dtype == FLOAT:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(fill.as_tensor().numpy().astype(np.float16)))


def _narrow_weight(graph: ir.Graph, value: ir.Value, wide: set[ir.Node]) -> None:
    """Give the nodes that compute in float16 the weight in float16."""
    uses = [use for use in value.uses() if not _takes_float(use.node, use.idx, wide)]
    if not uses or value.const_value is None:
        return
    array = value.const_value.numpy()
    if array.size and np.abs(array).max() > LARGEST:
        raise UnsupportedError(
            f"expected weights up to {LARGEST:.0f} for float16, received {value.name} with {np.abs(array).max():g}; "
            f"leave {option('half')} out"
        )
    name = str(value.name)
    shared = len(uses) < len(value.uses())
    narrow = ir.val(f"{name}.half" if shared else name, const_value=ir.tensor(array.astype(np.float16)))
    for use in uses:
        use.node.replace_input_with(use.idx, narrow)
    if not shared:
        del graph.initializers[name]
    graph.register_initializer(narrow)


def _takes_float(node: ir.Node, index: int, wide: set[ir.Node]) -> bool:
    return node in wide or index in ALWAYS_FLOAT_INPUTS.get(node.op_type, ())
