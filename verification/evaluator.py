"""ONNX files in ONNX's own evaluator, and the first value in a file that is not finite."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops import op_conv

from .file import OnnxFile

Array = NDArray[Any]


class Conv(op_conv.Conv):
    """A convolution that sums in float32, as devices do; NumPy's own float16 takes 18 s for a ResNet-50."""

    op_domain = ""

    def _run(self, *arrays: Any, **attributes: Any) -> Any:
        wide = [None if array is None else array.astype(np.float32) for array in arrays]
        results = super()._run(*wide, **attributes)  # type: ignore[no-untyped-call]
        return tuple(result.astype(arrays[0].dtype) for result in results)


def evaluate(file: OnnxFile, feed: Mapping[str, Array]) -> dict[str, Array]:
    """Return every value in the graph, each in the type the graph gives it.

    onnxruntime computes float16 in float32 on the CPU, which hides what overflows elsewhere.
    """
    evaluator = ReferenceEvaluator(str(file.path), new_ops=[Conv])
    with np.errstate(all="ignore"):
        values: Any = evaluator.run(None, dict(feed), intermediate=True)
    return dict(values)


def first_infinite(file: OnnxFile, values: Mapping[str, Any]) -> str | None:
    """Return the first value in the graph that is not finite, with the operator it comes from."""
    for node in file.proto.graph.node:
        for name in node.output:
            value = values.get(name)
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
                return f"{name} of {node.op_type}"
    return None
