"""Convert a Keras model that runs on PyTorch to ONNX with torch's exporter."""

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch

from ...frameworks.keras import Specs
from ..fold import simplify
from ..torch.exporter import export_module

_SIZE = 64  # of the example, where the model leaves a size open

_EVERY_SIZE = 2**62


def convert(
    function: Callable[..., Sequence[Any]], model: Any, specs: Specs, names: Callable[[], Sequence[str]], opset: int
) -> ir.Model:
    """Return ``function``, which calls ``model`` on one tensor per entry of ``specs``, as an ONNX model.

    The inputs are named as in ``specs``; ``names`` is asked for the outputs' names once the function is traced.
    Raises `UnsupportedError` if torch cannot export it.
    """
    shapes = [shape for shape, _ in specs.values()]
    example = tuple(
        torch.zeros((2, *(_SIZE if size is None else size for size in shape)), dtype=getattr(torch, dtype))
        for shape, dtype in specs.values()
    )
    dynamic = tuple(
        {0: torch.export.Dim("batch")}
        | {axis: torch.export.Dim(f"{name}_dim_{axis}") for axis, size in enumerate(shape, 1) if size is None}
        for name, shape in zip(specs, shapes, strict=True)
    )
    module = _Function(function, model).eval()
    described = f"{type(model).__name__} {model.name!r}"
    with torch.no_grad():
        cpu = tuple(tensor.cpu() for tensor in example)
        converted = export_module(module, cpu, dynamic, opset=opset, described=described)
    graph = converted.graph
    for value, name in zip([*graph.inputs, *graph.outputs], [*specs, *names()], strict=True):
        value.name = name
    simplify(converted, input_size_limit=_EVERY_SIZE, output_size_limit=_EVERY_SIZE)
    return converted


class _Function(torch.nn.Module):
    """A function as a module, which holds the model it calls."""

    def __init__(self, function: Callable[..., Sequence[Any]], model: Any) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, *inputs: Any) -> list[Any]:
        """Call the function."""
        return list(self._function(*inputs))
