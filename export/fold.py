"""Fold BatchNormalization nodes with constant statistics into the linear node before them.

A BatchRenorm, and a SwitchNorm whose gates are one-hot on the batch statistics, is a BatchNormalization at inference.
With s = γ/√(v+ε) per output channel, the weights become W·s and the bias (b-μ)·s + β. The fold works on the graph,
where shared weights, branches and graph outputs are plain to see, and so serves both frameworks.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[np.float64]

_LINEAR = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class Fold:
    """What became of one BatchNormalization: the linear node it went into, or why it stays."""

    value: str
    into: str | None
    reason: str = ""


def fold_batch_norms(model: ir.Model) -> list[Fold]:
    """Fold every BatchNormalization that can be, in place, and say what became of each.

    A folded node's output value lives on as the linear node's output, under the same name.
    """
    folds = []
    for node in list(model.graph):
        if node.op_type == "BatchNormalization" and node.domain == "":
            reason = _obstacle(node)
            output = node.outputs[0]
            if reason:
                folds.append(Fold(str(output.name), None, reason))
                continue
            linear = node.inputs[0].producer()  # type: ignore[union-attr]
            assert linear is not None
            _fold(model.graph, linear, node)
            folds.append(Fold(str(output.name), linear.op_type))
    return folds


def folded_affine(gamma: Array, beta: Array, mean: Array, var: Array, eps: float) -> tuple[Array, Array]:
    """Return the scale and shift, each (C,), that a BatchNorm applies at inference."""
    scale = gamma / np.sqrt(var + eps)
    return scale, beta - mean * scale


def scale_weight(weight: Array, scale: Array, op_type: str, *, groups: int = 1, transposed: bool = True) -> Array:
    """Return ``weight`` with each output channel scaled.

    Output channels are axis 0 of a Conv (M, C/g, ...) and of a transposed Gemm (M, K), axis 1 of a plain Gemm
    (K, M), and of a ConvTranspose (C, M/g, ...) axis 1 within each group's share of axis 0.
    """
    if op_type == "ConvTranspose":
        inputs, outputs, *kernel = weight.shape
        grouped = weight.reshape(groups, inputs // groups, outputs, *kernel)
        return (grouped * scale.reshape(groups, 1, outputs, *[1] * len(kernel))).reshape(weight.shape)
    if op_type == "Gemm" and not transposed:
        return weight * scale
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))


def _obstacle(node: ir.Node) -> str:
    source = node.inputs[0]
    if any(_constant(value) is None for value in node.inputs[1:]):
        return "its statistics are not constant"
    linear = None if source is None else source.producer()
    if linear is None or linear.op_type not in _LINEAR:
        return f"it follows {'the input' if linear is None else linear.op_type}, not a linear layer"
    if source is not None and (source.is_graph_output() or len(source.uses()) > 1):
        return f"the output of the {linear.op_type} before it is used elsewhere too"
    if any(value is not None and _constant(value) is None for value in linear.inputs[1:]):
        return f"the weights of the {linear.op_type} before it are not constant"
    if linear.op_type == "Gemm" and any(_attribute(linear, name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return "the Gemm before it scales its operands"
    return ""


def _fold(graph: ir.Graph, linear: ir.Node, norm: ir.Node) -> None:
    gamma, beta, mean, var = (_require(value) for value in norm.inputs[1:5])
    scale, shift = folded_affine(gamma, beta, mean, var, float(_attribute(norm, "epsilon", 1e-5)))
    weight = scale_weight(
        _require(linear.inputs[1]),
        scale,
        linear.op_type,
        groups=int(_attribute(linear, "group", 1)),
        transposed=bool(_attribute(linear, "transB", 0)),
    )
    has_bias = len(linear.inputs) > 2 and linear.inputs[2] is not None
    bias = (_require(linear.inputs[2]) if has_bias else 0.0) * scale + shift
    dtype = linear.inputs[1].dtype.numpy()  # type: ignore[union-attr]
    name = str(norm.outputs[0].name)
    inputs = [linear.inputs[0]]
    for part, array in (("weight", weight), ("bias", bias)):
        value = ir.val(f"{name}.folded_{part}", const_value=ir.tensor(np.asarray(array, dtype)))
        graph.register_initializer(value)
        inputs.append(value)
    folded = ir.node(linear.op_type, inputs, attributes=linear.attributes, name=linear.name)
    folded.outputs[0].type, folded.outputs[0].shape = norm.outputs[0].type, norm.outputs[0].shape
    ir.convenience.replace_nodes_and_values(graph, norm, [norm], [folded], norm.outputs, folded.outputs)
    folded.outputs[0].name = name
    graph.remove(linear, safe=True)


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
