"""What torch's own exporter writes of a module."""

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ...errors import UnsupportedError
from ...frameworks.torch import quiet


def export_module(
    module: nn.Module, example: tuple[Tensor, ...], shapes: tuple[Any, ...], *, opset: int, described: str
) -> ir.Model:
    """Return ``module`` as torch's exporter writes it, its open sizes named by ``shapes``.

    Raises `UnsupportedError`, which calls the model ``described``, where the exporter fails.
    """
    try:
        with quiet():
            program = torch.onnx.export(
                module, example, dynamo=True, opset_version=opset, optimize=False, verbose=False,
                dynamic_shapes=(shapes,),
            )  # fmt: skip
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UnsupportedError(
            f"expected a model torch.onnx.export can export, received {described} on which it fails: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
    assert program is not None
    _drop_zero_biases(program.model.graph)
    return program.model


def _drop_zero_biases(graph: ir.Graph) -> None:
    """Leave out the bias that torch writes for a convolution without one.

    It expands a 0, in 3d to a matrix, which no runtime takes for a bias.
    """
    for node in graph:
        if node.op_type == "Conv" and len(node.inputs) == 3 and _is_expanded_zero(node.inputs[2]):
            node.resize_inputs(2)


def _is_expanded_zero(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Expand":
        return False
    while node is not None and node.op_type in ("Expand", "CastLike", "Cast", "Identity"):
        value = node.inputs[0]
        node = None if value is None else value.producer()
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return constant is not None and not constant.numpy().any()
