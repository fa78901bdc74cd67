"""Convert a Keras model that runs on PyTorch to ONNX with torch's exporter."""

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch

from ...frameworks.keras import Specs
from ..dimensions import Open
from ..fold import simplify
from ..names import settle
from ..torch.exporter import export_module

_EVERY_SIZE = 2**62


def convert(
    function: Callable[..., Sequence[Any]],
    model: Any,
    specs: Specs,
    open_sizes: Open,
    names: Callable[[], Sequence[str]],
    opset: int,
) -> tuple[ir.Model, list[tuple[int, int]]]:
    """Return ``function``, which calls ``model`` on one tensor per entry of ``specs``, as an ONNX model.

    Beside it, which of the ``open_sizes`` the model fixes. The inputs are named as in ``specs``; ``names`` is asked for
    the outputs' names once the function is traced.
    Raises `UnsupportedError` if torch cannot export it.
    """
    example = [torch.zeros(shape, dtype=getattr(torch, dtype)).cpu() for shape, dtype in specs.values()]
    module = _Function(function, model).eval()
    described = f"{type(model).__name__} {model.name!r}"
    with torch.no_grad():
        converted, fixed = export_module(module, example, open_sizes, opset=opset, described=described)
    settle(converted.graph, [*specs], [*names()])
    simplify(converted, input_size_limit=_EVERY_SIZE, output_size_limit=_EVERY_SIZE)
    return converted, fixed


class _Function(torch.nn.Module):
    """A function as a module, which holds the model it calls."""

    def __init__(self, function: Callable[..., Sequence[Any]], model: Any) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, *inputs: Any) -> list[Any]:
        """Call the function."""
        return list(self._function(*inputs))
