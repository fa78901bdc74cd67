"""A small ONNX model, whole or wronged."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from normswap.errors import InputError
from normswap.verification.file import read_model

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def scores(opset=20, ir_version=9, op="MatMul", domain="", weight=WEIGHT):
    """A model of one matrix product, (batch, 3) to (batch, 4)."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    node = helper.make_node(op, ["x", "w"], ["y"], name="head", domain=domain)
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def endless(opset=20):
    """A model that goes through a loop for longer than anyone waits, (batch, 3) to (batch, 3)."""
    turn = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    true = {name: helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go", "on")}
    rows = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("x", "y", "a", "b")}
    nodes = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Neg", ["a"], ["b"])]
    body = helper.make_graph(nodes, "body", [turn, true["go"], rows["a"]], [true["on"], rows["b"]])
    often = [numpy_helper.from_array(np.array(2**62), "often"), numpy_helper.from_array(np.array(True), "first")]
    loop = helper.make_node("Loop", ["often", "first", "x"], ["y"], body=body)
    graph = helper.make_graph([loop], "g", [rows["x"]], [rows["y"]], often)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def external(folder, **entries):
    """A file whose weight is external data described by ``entries``."""
    proto = scores()
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        weight.external_data.add(key=key, value=str(value))
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


def refused(path, error=InputError):
    """The whole message with which a file is refused."""
    with pytest.raises(error) as caught:
        read_model(path)
    assert type(caught.value) is error
    return str(caught.value)
