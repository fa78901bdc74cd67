"""Find values of a Keras model in the ONNX graph it became, and tidy that graph."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import keras
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from ...frameworks.names import unique

_FIRST_EXPONENT = 1000.0


def mark(tensor: Any, number: int) -> Any:
    """Return a tensor whose operator `marks` finds again after conversion, by its number.

    It is a power, which no optimizer folds or moves a Transpose past; being different, two are never merged.
    """
    return keras.ops.cast(tensor, "float32") ** (_FIRST_EXPONENT + number)


def marks(graph: ir.Graph) -> dict[int, ir.Node]:
    """Return the operators that `mark` left, by number."""
    found = {}
    for node in graph:
        exponent = _constant(node.inputs[1], rank=0) if node.op_type == "Pow" else None
        if exponent is not None and exponent.numpy().item() >= _FIRST_EXPONENT:
            found[int(exponent.numpy().item() - _FIRST_EXPONENT)] = node
    return found


def probe(tensors: Sequence[Any]) -> Any:
    """Return one vector that depends on all ``tensors``: tf2onnx walks the whole graph once per output."""
    start = keras.ops.zeros((1,))
    return keras.ops.concatenate([start, *(keras.ops.reshape(tensor, (-1,)) for tensor in tensors)])


def take_probe(graph: ir.Graph) -> dict[int, ir.Value]:
    """Remove the last output, made by `probe`, and return the marked values it was made of, by number."""
    ends = marks(graph)
    values = {number: _input(node) for number, node in ends.items()}
    _remove_unused(graph.outputs.pop(), stop=set(ends.values()))
    return values


def name_sites(sites: Mapping[str, ir.Value], taken: Sequence[str]) -> dict[str, ir.Value]:
    """Give each site's value the site's name, unless it is an output; drop sites that are not computed."""
    found = {}
    for site, value in sites.items():
        if value.producer() is not None:
            if not value.is_graph_output():
                value.name = unique(site, taken)
            found[site] = value
    return found


def merge_outputs(graph: ir.Graph) -> None:
    """Let each output be the computed value itself where it is an Identity of one."""
    for output in list(graph.outputs):
        node = output.producer()
        if node is None or node.op_type != "Identity":
            continue
        value = _input(node)
        if value.producer() is not None and not value.is_graph_output():
            _replace(node, value)


def write_gemms(model: ir.Model) -> None:
    """Write the product of a matrix (N, K) with constant weights, and a constant added to it, as one Gemm."""
    ShapeInferencePass()(model)
    graph = model.graph
    for node in list(graph):
        if node.op_type != "MatMul" or _rank(node.inputs[0]) != 2 or not _constant(node.inputs[1], rank=2):
            continue
        last, inputs = node, list(node.inputs)
        users = node.outputs[0].consumers()
        if len(users) == 1 and users[0].op_type == "Add" and not node.outputs[0].is_graph_output():
            bias = next((value for value in users[0].inputs if _constant(value, rank=1)), None)
            if bias is not None:
                last, inputs = users[0], [*inputs, bias]
        gemm = ir.node("Gemm", inputs, name=node.name)
        graph.insert_before(last, gemm)
        _replace(last, gemm.outputs[0])
        if last is not node:
            _remove(node)


def add_biases(graph: ir.Graph) -> None:
    """Make a constant per channel that is added to what a convolution without bias computes the convolution's bias."""
    for node in list(graph):
        if node.op_type != "Add":
            continue
        for value, other in (node.inputs, node.inputs[::-1]):
            conv = None if value is None or len(value.uses()) > 1 else value.producer()
            rank = _rank(node.outputs[0])
            if conv is None or rank is None or conv.op_type not in {"Conv", "ConvTranspose"} or len(conv.inputs) > 2:
                continue
            bias = _constant(other, rank)
            if bias is None or bias.numpy().size != bias.shape[1]:
                continue
            name = f"{node.outputs[0].name}/bias"
            vector = ir.val(name, const_value=ir.tensor(bias.numpy().reshape(-1), name=name))
            graph.register_initializer(vector)
            new = ir.node(conv.op_type, [*conv.inputs, vector], conv.attributes, name=conv.name)
            graph.insert_before(node, new)
            _replace(node, new.outputs[0])
            break


def tidy(graph: ir.Graph, keep: Collection[ir.Value]) -> None:
    """Drop what is used by none and not in ``keep``, and give values and nodes plain names."""
    needed = {id(value) for value in keep}
    for node in reversed(graph):
        if not any(v.uses() or v.is_graph_output() or id(v) in needed for v in node.outputs):
            _remove(node)
        # onnxruntime moves a Pad of zeros into the MaxPool after it, which pads with -inf; this attribute, which
        # says what is so anyway, keeps it from that.
        if node.op_type == "MaxPool" and "pads" not in node.attributes and _is_made_by(node.inputs[0], "Pad"):
            node.attributes["auto_pad"] = ir.AttrString("auto_pad", "VALID")
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]

    values = [*graph.inputs, *(v for n in graph.all_nodes() for v in [*n.inputs, *n.outputs] if v is not None)]
    values = list({id(value): value for value in values}.values())
    taken = {value.name for value in values}
    for value in values:
        if value.name and (plain := _plain(value.name)) != value.name:
            taken.discard(value.name)
            value.name = unique(plain, taken)
            taken.add(value.name)
        if value.shape is not None and not value.is_graph_input() and not value.is_graph_output():
            value.shape = ir.Shape([dim if isinstance(dim, int) else None for dim in value.shape])
    named: set[str] = set()
    for node in graph.all_nodes():
        node.name = unique(_plain(node.name or "") or node.op_type, named)
        named.add(node.name)


def declare(
    graph: ir.Graph,
    shapes: Sequence[tuple[int, ...]],
    open_sizes: Mapping[tuple[int, int], str],
    returned: Sequence[Sequence[int]],
) -> None:
    """Let inputs and outputs tell their shapes, sizes that are open by name.

    An output's first size is the batch where it is open, the inputs have only one such size, and the output had as many
    as they in what a call ``returned``.
    """
    for index, (value, shape) in enumerate(zip(graph.inputs, shapes, strict=True)):
        value.shape = ir.Shape([open_sizes.get((index, axis), size) for axis, size in enumerate(shape)])
    first = {name: shapes[index][0] for (index, axis), name in open_sizes.items() if axis == 0}
    batch, samples = next(iter(first.items())) if len(first) == 1 else (None, 0)
    for value, own in zip(graph.outputs, returned, strict=True):
        sizes = [size if isinstance(size, int) else None for size in value.shape or ()]
        named = batch if tuple(own[:1]) == (samples,) else None
        value.shape = ir.Shape([named if axis == 0 and size is None else size for axis, size in enumerate(sizes)])


def _plain(name: str) -> str:
    """Return ``name`` without what TensorFlow and tf2onnx add: an output's index, and a number of no fixed order."""
    return re.sub(r"(__\d+)+$", "", name.removesuffix(":0")).replace(":", "_")


def _replace(node: ir.Node, new: ir.Value) -> None:
    """Remove ``node`` and let ``new`` be its output, under its name."""
    old = node.outputs[0]
    name, new.shape, new.type = old.name, old.shape or new.shape, old.type or new.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    _remove(node)
    new.name = name


def _remove_unused(value: ir.Value, stop: set[ir.Node]) -> None:
    """Remove the operators that only ``value`` needs, back to those in ``stop`` and including them."""
    node = value.producer()
    if node is None or value.uses() or value.is_graph_output():
        return
    inputs = list(node.inputs)
    _remove(node)
    for source in inputs:
        if source is not None and node not in stop:
            _remove_unused(source, stop)


def _remove(node: ir.Node) -> None:
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints())


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _constant(value: ir.Value | None, rank: int) -> ir.TensorProtocol | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor if tensor is not None and len(tensor.shape) == rank else None


def _is_made_by(value: ir.Value | None, op_type: str) -> bool:
    node = None if value is None else value.producer()
    return node is not None and node.op_type == op_type
