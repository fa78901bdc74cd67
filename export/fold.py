"""Fold BatchNormalization nodes with constant statistics into the linear node before them.

A BatchRenorm, and a SwitchNorm whose gates are one-hot on the batch statistics, is a BatchNormalization at inference.
What lies between it and the linear node may move values about and add, subtract, multiply or divide by constants.
All of that together is one scale s and one shift t for each channel of the linear node, or the norm stays. The weights
become W·s, the bias b·s + t. What s and t are is measured, not derived: the nodes are computed on numbers. They are
then held against what takes their place, and so is the linear node against the new one, on random input.

The fold works on the graph, where shared weights, branches and graph outputs are plain to see, and so serves both
frameworks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from .trial import chained, product

Array = NDArray[np.float64]

_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MOVES = ("Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_ARITHMETIC = ("Add", "Div", "Mul", "Neg", "Sub")

TOLERANCE = 3e-5
"""How far a folded channel may be from the unfolded one, as a share of its largest value, summed in float32."""

_BATCH, _SIZE = 6, 3
"""Sizes for those a graph leaves open, and the largest of maps where a node treats every position alike."""


@dataclass(frozen=True)
class Fold:
    """What became of one BatchNormalization: the linear node it went into, or why it stays."""

    value: str
    into: str | None
    reason: str = ""


@dataclass(frozen=True)
class _Step:
    """One node on the way from a linear one to its norm, and at which input it reads the one before."""

    node: ir.Node
    place: int = 0


@dataclass(frozen=True)
class _Line:
    """A scale and a shift, each (C,), for the channels of a linear node."""

    scale: Array
    shift: Array

    def of(self, x: Array, axis: int) -> Array:
        """Return ``x``, whose channels are at ``axis``, scaled and shifted."""
        shape = [1] * x.ndim
        shape[axis] = -1
        found: Array = x * self.scale.reshape(shape) + self.shift.reshape(shape)
        return found


def fold_batch_norms(model: ir.Model) -> list[Fold]:
    """Fold every BatchNormalization that can be, in place, and say what became of each.

    A folded node's output value lives on as what the linear node computes, under the same name.
    """
    _cancel_transposes(model.graph)
    opset = model.opset_imports[""]
    norms = [node for node in model.graph if node.op_type == "BatchNormalization" and node.domain == ""]
    folds = [_fold(model.graph, norm, opset) for norm in norms]
    _cancel_transposes(model.graph)
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


def scale_weight(
    weight: NDArray[np.floating], scale: Array, op_type: str, *, groups: int = 1, transposed: bool = True
) -> NDArray[np.floating]:
    """Return ``weight`` with each output channel scaled, in its own type, the product rounded once.

    Output channels are axis 0 of a Conv (M, C/g, ...) and of a transposed Gemm (M, K), axis 1 of a plain Gemm
    (K, M) and of a product of matrices (K, M), and of a ConvTranspose (C, M/g, ...) axis 1 within each group's share
    of axis 0.
    """
    factor, seen = scale, weight
    if op_type == "ConvTranspose":
        inputs, outputs, *kernel = weight.shape
        seen = weight.reshape(groups, inputs // groups, outputs, *kernel)
        factor = scale.reshape(groups, 1, outputs, *[1] * len(kernel))
    elif op_type == "Conv" or (op_type == "Gemm" and transposed):
        factor = scale.reshape(-1, *[1] * (weight.ndim - 1))
    with np.errstate(all="ignore"):
        found: NDArray[np.floating] = np.multiply(seen, factor, out=np.empty_like(seen), casting="unsafe")
    return found.reshape(weight.shape)


def _fold(graph: ir.Graph, norm: ir.Node, opset: int) -> Fold:
    """Put new nodes in the place of ``norm`` and those on the way to it, if they compute what all of them did."""
    name = str(norm.outputs[0].name)
    way = _way(norm)
    if reason := _obstacle(norm, way):
        return Fold(name, None, reason)
    linear, steps = way[-1].node, [*way[-2::-1], _Step(norm)]
    line = _line(linear, steps, opset)
    if line is None:
        return Fold(name, None, f"it is no scale and shift for each channel of the {linear.op_type} before it")
    weight, bias = _folded(linear, line)
    if not _agree(linear, weight, bias, line, opset):
        return Fold(name, None, f"folded into the {linear.op_type} before it, it would not compute the same")
    new = _rewritten(graph, linear, [step for step in steps if step.node.op_type in _MOVES], (weight, bias), name)
    last = new[-1].outputs[0]
    last.type, last.shape = norm.outputs[0].type, norm.outputs[0].shape
    ir.convenience.replace_nodes_and_values(graph, norm, [norm], new, norm.outputs, [last])
    last.name = name
    for step in way:
        graph.remove(step.node, safe=True)
    return Fold(name, linear.op_type)


def _way(norm: ir.Node) -> list[_Step]:
    """Return the nodes from the norm's input back to the linear one, or to one that is in the way."""
    way: list[_Step] = []
    value = norm.inputs[0]
    while value is not None and (node := value.producer()) is not None:
        place = _place(node)
        way.append(_Step(node, place or 0))
        if place is None:
            break
        value = node.inputs[place]
    return way


def _place(node: ir.Node) -> int | None:
    """Return which input a node only moves about, or takes together with a constant; None if it does neither."""
    if node.domain == "" and node.op_type in _MOVES:
        reshaped = node.op_type == "Reshape"
        return 0 if reshaped or all(map(_is_constant, node.inputs[1:])) else None
    if node.domain == "" and node.op_type in _ARITHMETIC:
        others = [index for index, value in enumerate(node.inputs) if not _is_constant(value)]
        return others[0] if len(others) == 1 and (others == [0] or node.op_type != "Div") else None
    return None


def _obstacle(norm: ir.Node, way: Sequence[_Step]) -> str:
    """Return why the norm cannot go into the linear node at the end of ``way``, or nothing."""
    if not all(map(_is_constant, norm.inputs[1:])) or _attribute(norm, "training_mode", 0):
        return "its statistics are not constant"
    linear = way[-1].node if way else None
    if linear is None or _place(linear) is not None:
        return "it follows the input, not a linear layer"
    if linear.op_type not in _LINEAR:
        return f"it follows {linear.op_type}, not a linear layer"
    for step in way:
        if step.node.outputs[0].is_graph_output() or len(step.node.outputs[0].uses()) > 1:
            return f"the output of the {step.node.op_type} before it is used elsewhere too"
    if not all(value is None or _is_constant(value) for value in linear.inputs[1:]):
        return f"the weights of the {linear.op_type} before it are not constant"
    if len(_weight(linear).shape) < 2 or (linear.op_type == "Gemm" and _rows(linear) > 1):
        return f"the {linear.op_type} before it has no weight and bias for each channel"
    return ""


def _line(linear: ir.Node, steps: Sequence[_Step], opset: int) -> _Line | None:
    """Return what ``steps`` do to each channel that a linear node computes, None where that is no line.

    Where nothing is reshaped, maps of few values show it; if constants differ from place to place, those of all.
    """
    reshaped = any(step.node.op_type in ("Reshape", "Flatten") for step in steps)
    for largest in (None,) if reshaped else (_SIZE, None):
        try:
            if (line := _tried(linear, steps, _shape(linear, steps, largest), opset)) is not None:
                return line
        except Exception:  # of sizes that do not go together: whatever the evaluator or NumPy calls it
            continue
    return None


def _tried(linear: ir.Node, steps: Sequence[_Step], shape: Sequence[int], opset: int) -> _Line | None:
    """Return the line that ``steps`` are on an input of ``shape``, None if they are none on random numbers."""
    channels, axis = _channels(linear), _axis(linear, len(shape))
    known = _targets(linear, steps, shape)
    moves = [step for step in steps if step.node.op_type in _MOVES]

    def run(some: Sequence[_Step], x: Array) -> Array:
        return chained([step.node for step in some], x, [step.place for step in some], known, opset)

    numbers = np.arange(channels, dtype=np.float64).reshape([-1 if each == axis else 1 for each in range(len(shape))])
    numbers = run(moves, np.broadcast_to(numbers, shape))
    shift, moved = run(steps, np.zeros(shape)), run(steps, np.ones(shape))
    present, first = np.unique(numbers, return_index=True)
    if shift.shape != numbers.shape or len(present) < channels:
        return None
    shift = shift.reshape(-1)[first]
    line = _Line(moved.reshape(-1)[first] - shift, shift)
    x = np.random.default_rng(0).standard_normal(shape)
    wanted, found = run(steps, x), run(moves, line.of(x, axis))
    size = run(moves, _Line(np.abs(line.scale), np.abs(line.shift)).of(np.ones(shape), axis))
    return line if bool((np.abs(found - wanted) <= 1e-9 * size).all()) else None


def _shape(linear: ir.Node, steps: Sequence[_Step], largest: int | None) -> list[int]:
    """Return sizes of what a linear node computes: its own but up to ``largest``, and some for those it leaves open.

    The batch is open. Raises `ValueError` where the node's number of dimensions is unknown.
    """
    known = _sizes(linear)
    sizes = None if known is None else [dim if isinstance(dim, int) else None for dim in known]
    channels = _channels(linear)
    if linear.op_type.startswith("Conv"):
        sizes = sizes or [None] * len(_weight(linear).shape)
    elif linear.op_type == "Gemm":
        sizes = sizes or [None, None]
    elif sizes is None:
        raise ValueError("expected a product of a known number of dimensions")
    axis = _axis(linear, len(sizes))
    sizes[axis] = channels
    if largest is not None:
        return [channels if i == axis else min(largest, size or largest) for i, size in enumerate(sizes)]
    opened = _BATCH
    for step in steps:  # so that what is open can be cut into what is known behind a Reshape
        target = (_sizes(step.node) if step.node.op_type == "Reshape" else None) or ()
        behind = prod(dim for dim in target if isinstance(dim, int))
        opened *= behind // int(np.gcd(behind, prod(size for size in sizes if size)))
    first, *others = [i for i, size in enumerate(sizes) if size is None] or [0]
    filled = [_SIZE if i in others else size or 0 for i, size in enumerate(sizes)]
    filled[first] = filled[first] or opened
    return filled


def _targets(linear: ir.Node, steps: Sequence[_Step], shape: Sequence[int]) -> dict[str, NDArray[np.int64]]:
    """Return targets for the Reshapes whose own are computed, as sizes that are open are.

    They are what the graph tells of the sizes, where a name stands for the same in all of them.
    """
    named = dict(zip(_sizes(linear) or (), shape, strict=False))
    targets: dict[str, NDArray[np.int64]] = {}
    for step in steps:
        target = step.node.inputs[1] if step.node.op_type == "Reshape" else None
        if target is None or _is_constant(target):
            continue
        dims = _sizes(step.node)
        if dims is None:
            raise ValueError("expected a Reshape to a known number of dimensions")
        sizes = [dim if isinstance(dim, int) else named.get(dim, 0) if dim else 0 for dim in dims]
        left = prod(shape) // prod(size for size in sizes if size)
        for place, size in enumerate(sizes):
            if not size:  # the last takes what is left
                several = 0 in sizes[place + 1 :]
                sizes[place] = next((each for each in (2, 3, 5, 7) if left % each == 0), 1) if several else left
                left //= sizes[place]
        named |= dict(zip(dims, sizes, strict=True))
        targets[str(target.name)] = np.array(sizes, np.int64)
    return targets


def _sizes(node: ir.Node) -> list[int | str | None] | None:
    """Return the sizes of what a node computes, those that are open by their names."""
    shape = node.outputs[0].shape
    return None if shape is None else [dim if isinstance(dim, int) else dim.value for dim in shape]


def _folded(linear: ir.Node, line: _Line) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return the weight and the bias of a linear node that computes what ``line`` makes of what ``linear`` does."""
    weight = scale_weight(
        _weight(linear).numpy(),
        line.scale,
        linear.op_type,
        groups=int(_attribute(linear, "group", 1)),
        transposed=bool(_attribute(linear, "transB", 0)),
    )
    with np.errstate(all="ignore"):
        return weight, (_bias(linear) * line.scale + line.shift).astype(weight.dtype)


def _agree(linear: ir.Node, weight: NDArray[np.floating], bias: NDArray[np.floating], line: _Line, opset: int) -> bool:
    """Return whether a linear node with other weights computes what ``line`` makes of what it did, on random input."""
    before = _weight(linear).numpy()
    channels, x = _channels(linear), np.random.default_rng(0).standard_normal(_given(linear, before.shape))
    try:
        old, new = (product(linear, x, each, channels, opset).astype(np.float64) for each in (before, weight))
    except Exception:  # of a type or an operator that the runtime does not know
        return False
    axis = _axis(linear, old.ndim)
    wanted = line.of(_Line(np.ones(channels), _bias(linear)).of(old, axis), axis)
    found = _Line(np.ones(channels), bias.astype(np.float64)).of(new, axis)
    off, size = (np.moveaxis(np.abs(each), axis, 0).reshape(channels, -1) for each in (found - wanted, wanted))
    return off.size > 0 and bool((off.max(1) <= TOLERANCE * size.max(1)).all())


def _given(linear: ir.Node, weight: Sequence[int]) -> list[int]:
    """Return the shape of an input of a linear node: several samples of few values."""
    if linear.op_type == "MatMul":
        return [8, weight[-2]]
    if linear.op_type == "Gemm":
        shape = [8, weight[1 if _attribute(linear, "transB", 0) else 0]]
        return shape[::-1] if _attribute(linear, "transA", 0) else shape
    if linear.op_type == "ConvTranspose":
        return [2, weight[0], *[3] * (len(weight) - 2)]
    kernel = weight[2:]
    dilations = linear.attributes.get("dilations")
    spread = [1] * len(kernel) if dilations is None else dilations.as_ints()
    span = [(size - 1) * gap + 1 for size, gap in zip(kernel, spread, strict=True)]
    return [8 if prod(span) == 1 else 2, weight[1] * int(_attribute(linear, "group", 1)), *span]


def _rewritten(
    graph: ir.Graph,
    linear: ir.Node,
    moves: Sequence[_Step],
    arrays: tuple[NDArray[np.floating], NDArray[np.floating]],
    name: str,
) -> list[ir.Node]:
    """Return new nodes: ``linear`` with other weights, and ``moves`` of what it computes."""
    constants = []
    for part, array in zip(("weight", "bias"), arrays, strict=True):
        value = ir.val(f"{name}.folded_{part}", const_value=ir.tensor(array))
        graph.register_initializer(value)
        constants.append(value)
    weight, bias = constants
    if linear.op_type == "MatMul":
        new = [ir.node("MatMul", [linear.inputs[0], weight], name=linear.name)]
        new.append(ir.node("Add", [new[0].outputs[0], bias]))
    else:
        attributes = {key: value for key, value in linear.attributes.items() if key != "beta"}
        new = [ir.node(linear.op_type, [linear.inputs[0], weight, bias], attributes=attributes, name=linear.name)]
    for node in new:
        node.outputs[0].type, node.outputs[0].shape = linear.outputs[0].type, linear.outputs[0].shape
    for step in moves:
        old = step.node
        new.append(ir.node(old.op_type, [new[-1].outputs[0], *old.inputs[1:]], attributes=old.attributes))
        new[-1].outputs[0].type, new[-1].outputs[0].shape = old.outputs[0].type, old.outputs[0].shape
    count: Counter[str] = Counter()
    for node in new[:-1]:
        kind = node.op_type.lower()
        count[kind] += 1
        node.outputs[0].name = f"{name}.{kind}" if count[kind] == 1 else f"{name}.{kind}_{count[kind]}"
    return new


def _axis(linear: ir.Node, rank: int) -> int:
    """Return where a linear node's output of ``rank`` dimensions has its channels."""
    return 1 if linear.op_type.startswith("Conv") else rank - 1


def _channels(linear: ir.Node) -> int:
    """Return how many channels a linear node computes."""
    shape = tuple(_weight(linear).shape.numpy())
    if linear.op_type == "Conv" or (linear.op_type == "Gemm" and _attribute(linear, "transB", 0)):
        return shape[0]
    return shape[1] * int(_attribute(linear, "group", 1)) if linear.op_type == "ConvTranspose" else shape[-1]


def _bias(linear: ir.Node) -> Array:
    """Return what a linear node adds to its channels, (C,)."""
    value = linear.inputs[2] if len(linear.inputs) > 2 else None
    bias = np.zeros(1) if value is None else _constant(value).reshape(-1) * _attribute(linear, "beta", 1.0)
    return np.broadcast_to(bias, _channels(linear))


def _rows(gemm: ir.Node) -> int:
    """Return for how many rows a Gemm has biases."""
    value = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    return 1 if value is None else prod(_constant(value).shape[:-1])


def _weight(linear: ir.Node) -> ir.TensorProtocol:
    value = linear.inputs[1]
    assert value is not None
    assert value.const_value is not None
    return value.const_value


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


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and not value.is_graph_input()


def _constant(value: ir.Value) -> Array:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float64)


def _attribute(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)
