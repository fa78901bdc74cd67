"""What a few nodes of a graph compute, tried on numbers: what a change of them is held against."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

Array = NDArray[Any]


def chained(nodes: Sequence[ir.Node], x: Array, places: Sequence[int], known: Mapping[str, Array], opset: int) -> Array:
    """Return what nodes, each of which reads the one before, make of ``x``, by ONNX's reference evaluator.

    ``places`` are the inputs at which each reads that. All others are constants, those of floats taken in float64, or
    ``known`` by name. Without nodes it is ``x``. Raises what the evaluator does where nodes do not go together.
    """
    if not nodes:
        return x
    feeds, protos = {"x0": x}, []
    for step, (node, place) in enumerate(zip(nodes, places, strict=True)):
        names = []
        for index, value in enumerate(node.inputs):
            if index == place:
                names.append(f"x{step}")
            elif value is None:
                names.append("")
            else:
                names.append(f"c{step}_{index}")
                feeds[names[-1]] = _array(value, known)
        protos.append(_renamed(node, names, f"x{step + 1}"))
    imports = [onnx.helper.make_opsetid("", opset)]
    function = onnx.helper.make_function("trial", "chain", [*feeds], [f"x{len(nodes)}"], protos, imports)
    with np.errstate(all="ignore"):
        found: Any = ReferenceEvaluator(function).run(None, feeds, {})
    return np.asarray(found[0])


def product(node: ir.Node, x: Array, weight: Array, channels: int, opset: int) -> Array:
    """Return what a linear node makes of ``x`` and ``weight`` without its bias, by onnxruntime.

    ``channels`` is the number of its outputs.
    """
    feeds = {"x": x.astype(weight.dtype), "weight": weight}
    if node.op_type != "MatMul":
        feeds["bias"] = np.zeros(channels, weight.dtype)
    described = _renamed(node, [*feeds], "y").SerializeToString(deterministic=True)
    found: Any = _session(described, onnx.helper.np_dtype_to_tensor_dtype(weight.dtype), opset).run(None, feeds)
    return np.asarray(found[0])


@lru_cache(maxsize=64)
def _session(described: bytes, element: int, opset: int) -> onnxruntime.InferenceSession:
    """Return a runner of one node, which networks have many alike of."""
    node = onnx.NodeProto.FromString(described)
    given, made = ([onnx.helper.make_tensor_value_info(v, element, None) for v in each] for each in (node.input, "y"))
    graph = onnx.helper.make_graph([node], "trial", given, made)
    imports = [onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(graph, opset_imports=imports)
    model.ir_version = onnx.helper.find_min_ir_version_for(imports, True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _renamed(node: ir.Node, inputs: Sequence[str], output: str) -> onnx.NodeProto:
    proto = ir.to_proto(node)
    named = onnx.NodeProto(op_type=proto.op_type, input=inputs, output=[output])
    named.attribute.extend(proto.attribute)
    return named


def _array(value: ir.Value, known: Mapping[str, Array]) -> Array:
    if value.const_value is None:
        return known[str(value.name)]
    array = value.const_value.numpy()
    return array.astype(np.float64) if array.dtype.kind == "f" else array
