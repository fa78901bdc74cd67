"""Fold BatchNormalization nodes with constant statistics into the linear node before them.

A BatchRenorm, and a SwitchNorm whose gates are one-hot on the batch statistics, is a BatchNormalization at inference.
With s = γ/√(v+ε) per output channel, the weights become W·s and the bias (b-μ)·s + β. The fold works on the graph,
where shared weights, branches and graph outputs are plain to see, and so serves both frameworks.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from onnxscript import optimizer

Array = NDArray[np.float64]

_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Fold:
    """What became of one BatchNormalization: the linear node it went into, or why it stays."""

    value: str
    into: str | None
    reason: str = ""


def fold_batch_norms(model: ir.Model) -> list[Fold]:
    """Fold every BatchNormalization that can be, in place, and say what became of each.

    A folded node's output value lives on as what the linear node computes, under the same name.
    """
    _cancel_transposes(model.graph)
    folds = []
    for node in list(model.graph):
        if node.op_type == "BatchNormalization" and node.domain == "":
            name = str(node.outputs[0].name)
            way = _way(node)
            reason = _obstacle(node, way)
            if reason:
                folds.append(Fold(name, None, reason))
                continue
            _fold(model.graph, way, node)
            folds.append(Fold(name, way[-1].op_type))
    return folds


def simplify(model: ir.Model, **limits: int) -> None:
    """Fold constants, those within ``limits`` of size, and drop what is dead: nothing that changes a norm."""
    optimizer.fold_constants(model, onnx_shape_inference=True, **limits)
    for each in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
    ):
        each(model)


def folded_affine(gamma: Array, beta: Array, mean: Array, var: Array, eps: float) -> tuple[Array, Array]:
    """Return the scale and shift, each (C,), that a BatchNorm applies at inference."""
    scale = gamma / np.sqrt(var + eps)
    return scale, beta - mean * scale


def scale_weight(weight: Array, scale: Array, op_type: str, *, groups: int = 1, transposed: bool = True) -> Array:
    """Return ``weight`` with each output channel scaled.

    Output channels are axis 0 of a Conv (M, C/g, ...) and of a transposed Gemm (M, K), axis 1 of a plain Gemm
    (K, M) and of a product of matrices (K, M), and of a ConvTranspose (C, M/g, ...) axis 1 within each group's share
    of axis 0.
    """
    if op_type == "ConvTranspose":
        inputs, outputs, *kernel = weight.shape
        grouped = weight.reshape(groups, inputs // groups, outputs, *kernel)
        return (grouped * scale.reshape(groups, 1, outputs, *[1] * len(kernel))).reshape(weight.shape)
    if op_type == "MatMul" or (op_type == "Gemm" and not transposed):
        return weight * scale
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))


def _way(norm: ir.Node) -> list[ir.Node]:
    """Return the nodes from the norm's input back to the linear one, or to one that is in the way.

    A product of matrices has its channels last: a constant may be added to them and a Transpose bring them forward.
    """
    way: list[ir.Node] = []
    value = norm.inputs[0]
    channels_last = _rank(value) == 2
    while value is not None and (node := value.producer()) is not None:
        way.append(node)
        if node.op_type == "Transpose" and not channels_last and _brings_last_to_second(node):
            channels_last = True
        elif not (node.op_type == "Add" and channels_last and _vector(node.inputs[1]) is not None):
            break
        value = node.inputs[0]
    return way


def _obstacle(norm: ir.Node, way: list[ir.Node]) -> str:
    """Return why the norm cannot go into the linear node at the end of ``way``, or nothing."""
    if any(_constant(value) is None for value in norm.inputs[1:]):
        return "its statistics are not constant"
    if not way:
        return "it follows the input, not a linear layer"
    linear = way[-1]
    channels_last = _rank(norm.inputs[0]) == 2 or way[0].op_type == "Transpose"
    fits = channels_last if linear.op_type == "MatMul" else len(way) == 1
    if linear.op_type not in _LINEAR or not fits:
        return f"it follows {way[0].op_type}, not a linear layer"
    for node in way:
        if node.outputs[0].is_graph_output() or len(node.outputs[0].uses()) > 1:
            return f"the output of the {node.op_type} before it is used elsewhere too"
    if any(value is not None and _constant(value) is None for value in linear.inputs[1:]):
        return f"the weights of the {linear.op_type} before it are not constant"
    if linear.op_type == "Gemm" and any(_attribute(linear, name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return "the Gemm before it scales its operands"
    return ""


def _fold(graph: ir.Graph, way: list[ir.Node], norm: ir.Node) -> None:
    """Put new nodes in the place of ``norm`` and those on the ``way`` to it, which compute what all of them did."""
    linear = way[-1]
    gamma, beta, mean, var = (_require(value) for value in norm.inputs[1:5])
    scale, shift = folded_affine(gamma, beta, mean, var, float(_attribute(norm, "epsilon", 1e-5)))
    weight = scale_weight(
        _require(linear.inputs[1]),
        scale,
        linear.op_type,
        groups=int(_attribute(linear, "group", 1)),
        transposed=bool(_attribute(linear, "transB", 0)),
    )
    added = next((node.inputs[1] for node in way if node.op_type == "Add"), None)
    bias = added if linear.op_type == "MatMul" else linear.inputs[2] if len(linear.inputs) > 2 else None
    dtype = linear.inputs[1].dtype.numpy()  # type: ignore[union-attr]
    name = str(norm.outputs[0].name)
    constants = []
    for part, array in (("weight", weight), ("bias", (0.0 if bias is None else _require(bias)) * scale + shift)):
        value = ir.val(f"{name}.folded_{part}", const_value=ir.tensor(np.asarray(array, dtype)))
        graph.register_initializer(value)
        constants.append(value)
    if linear.op_type == "MatMul":
        product = ir.node("MatMul", [linear.inputs[0], constants[0]], name=linear.name)
        new = [product, ir.node("Add", [product.outputs[0], constants[1]])]
    else:
        new = [ir.node(linear.op_type, [linear.inputs[0], *constants], attributes=linear.attributes, name=linear.name)]
    if way[0].op_type == "Transpose":
        new.append(ir.node("Transpose", [new[-1].outputs[0]], attributes=way[0].attributes))
    for node in new[:-1]:
        node.outputs[0].name = f"{name}.{node.op_type.lower()}"
    last = new[-1].outputs[0]
    last.type, last.shape = norm.outputs[0].type, norm.outputs[0].shape
    ir.convenience.replace_nodes_and_values(graph, norm, [norm], new, norm.outputs, [last])
    last.name = name
    for node in way:
        graph.remove(node, safe=True)


def _cancel_transposes(graph: ir.Graph) -> None:
    """Let what reads a Transpose that undoes the one before it read what that was given."""
    for node in list(graph):
        before = node.inputs[0].producer() if node.op_type == "Transpose" and node.inputs[0] is not None else None
        if before is None or before.op_type != "Transpose" or node.outputs[0].is_graph_output():
            continue
        first, second, given = *map(_permutation, (before, node)), before.inputs[0]
        if given is None or not first or [first[axis] for axis in second] != sorted(first):
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], given)
        graph.remove(node, safe=True)
        if not before.outputs[0].uses() and not before.outputs[0].is_graph_output():
            graph.remove(before, safe=True)


def _permutation(transpose: ir.Node) -> list[int]:
    perm = transpose.attributes.get("perm")
    return [] if perm is None else list(perm.as_ints())


def _brings_last_to_second(transpose: ir.Node) -> bool:
    axes = _permutation(transpose)
    return len(axes) > 2 and axes[1] == len(axes) - 1 and axes[0] == 0


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _vector(value: ir.Value | None) -> Array | None:
    array = _constant(value)
    return array if array is not None and array.ndim == 1 else None


def _constant(value: ir.Value | None) -> Array | None:
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return np.asarray(value.const_value.numpy(), np.float64)


def _require(value: ir.Value | None) -> Array:
    array = _constant(value)
    assert array is not None
    return array


def _attribute(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)
