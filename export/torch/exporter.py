"""What torch's own exporter writes of a module."""

import re
from collections.abc import Sequence
from types import FrameType

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ...errors import UnsupportedError
from ...frameworks.torch import quiet
from ..dimensions import BATCH, Open, apart, closed, shape_of, traced_sizes
from ..failures import chain, folders_of, line_of, place_of, reason_of


def export_module(
    module: nn.Module, example: Sequence[Tensor], open_sizes: Open, *, opset: int, described: str
) -> tuple[ir.Model, list[tuple[int, int]]]:
    """Return ``module`` as torch's exporter writes it, and which of the ``open_sizes`` are not open in it.

    Those have the example's own size: what the model fixes is fixed at nothing else. Raises `UnsupportedError`, which
    calls the model ``described``, where the exporter fails.
    """
    shapes = [tuple(tensor.shape) for tensor in example]
    waiting = dict(open_sizes)
    together = True
    while True:
        sizes = traced_sizes(shapes, waiting)
        tensors = [
            tensor if tensor.shape == size else tensor.repeat_interleave(size[0], 0)
            for tensor, size in zip(example, sizes, strict=True)
        ]
        try:
            converted = _exported(module, tensors, waiting, opset=opset)
        except Exception as error:
            if not waiting or _whatever_is_open(error):
                raise UnsupportedError(
                    f"expected a model torch.onnx.export can export, received {described} on which it fails: "
                    f"{reason_of(error).rstrip('.')}{place(error, module)}; write that in another way"
                ) from error
            rest = {place: name for place, name in waiting.items() if name == BATCH}
            waiting = rest if len(rest) < len(waiting) else {}
            continue
        fixed = closed(converted.graph, waiting)
        if together and any(list(waiting.values()).count(waiting[place]) > 1 for place in fixed):
            waiting, together = dict(apart(waiting)), False
            continue
        waiting = {place: name for place, name in waiting.items() if place not in fixed}
        if all(shape_of(converted.graph.inputs[index])[axis] == shapes[index][axis] for index, axis in fixed):
            _drop_zero_biases(converted.graph)
            _drop_missing_axes(converted.graph)
            _drop_idle_squeezes(converted.graph)
            return converted, [place for place in open_sizes if place not in waiting]


def _whatever_is_open(error: BaseException) -> bool:
    """Return whether an export failed by values of the data alone, which no fixed size of the inputs would help."""
    guards = [each for each in chain(error) if isinstance(each, GuardOnDataDependentSymNode)]
    return any(not re.search(r"\bs\d+\b", str(each)) for each in guards)


def _exported(module: nn.Module, tensors: Sequence[Tensor], open_sizes: Open, *, opset: int) -> ir.Model:
    dims = {name: torch.export.Dim(name) for name in open_sizes.values()}
    shapes = tuple(
        {axis: dims[name] for (input_, axis), name in open_sizes.items() if input_ == index}
        for index in range(len(tensors))
    )
    with quiet():
        program = torch.onnx.export(
            module, tuple(tensors), dynamo=True, opset_version=opset, optimize=False, verbose=False,
            dynamic_shapes=(shapes,),
        )  # fmt: skip
    assert program is not None
    return program.model


def place(error: BaseException, module: nn.Module) -> str:
    """Return where in a module, which holds the model as ``model``, the exporter failed."""
    names = {id(layer): name.removeprefix("model.") for name, layer in module.named_modules() if name != "model"}
    folders = folders_of([torch])

    def told(frame: FrameType) -> tuple[str, str]:
        node = frame.f_locals.get("node")  # of a graph that is being written
        if not isinstance(node, torch.fx.Node):
            return "", ""
        paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        stack = re.findall(r'File "(.+)", line (\d+)', node.stack_trace or "")
        lines = [line_of(file, number, folders) for file, number in stack]
        return (paths or [""])[-1].partition("model.")[2], next(filter(None, reversed(lines)), "")

    return place_of(error, names, [torch], told=told)


def _drop_zero_biases(graph: ir.Graph) -> None:
    """Leave out the bias that torch writes for a convolution without one.

    It expands a 0, in 3d to a matrix, which no runtime takes for a bias.
    """
    for node in graph:
        if node.op_type == "Conv" and len(node.inputs) == 3 and _is_expanded_zero(node.inputs[2]):
            node.resize_inputs(2)


def _drop_missing_axes(graph: ir.Graph) -> None:
    """Leave out the axes of a reduction over all of them, which torch reshapes although there are none."""
    for node in list(graph):
        if node.op_type == "Reshape" and node.inputs[0] is None:
            for use in list(node.outputs[0].uses()):
                use.node.replace_input_with(use.idx, None)
            graph.remove(node, safe=True)


def _drop_idle_squeezes(graph: ir.Graph) -> None:
    """Leave out a Squeeze of an axis whose size is not 1: torch's leaves that one alone, ONNX's fails."""
    for node in list(graph):
        if node.op_type != "Squeeze" or len(node.inputs) != 2:
            continue
        x, axes = node.inputs
        if x is None or axes is None or x.shape is None:
            continue
        constant = ir.convenience.get_const_tensor(axes)
        if constant is None or constant.size != 1:
            continue
        size = x.shape[int(constant.numpy().item())]
        if isinstance(size, int) and size != 1:
            ir.convenience.replace_all_uses_with(node.outputs[0], x, replace_graph_outputs=True)
            graph.remove(node, safe=True)


def _is_expanded_zero(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Expand":
        return False
    while node is not None and node.op_type in ("Expand", "CastLike", "Cast", "Identity"):
        value = node.inputs[0]
        node = None if value is None else value.producer()
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return constant is not None and not constant.numpy().any()
