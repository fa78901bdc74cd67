"""Faults planted in an ONNX file, whichever framework it is from."""

import numpy as np
import onnx
from onnx import helper, numpy_helper


def edited(path, change, **more):
    """Change what is in a file."""
    proto = onnx.load(path)
    change(proto, **more)
    onnx.save(proto, path)
    return path


def spoil_rows(proto, *, table, rows, how):
    """Zero rows of a table, give them each other's places, multiply them, or move one number."""
    (tensor,) = [tensor for tensor in proto.graph.initializer if tuple(tensor.dims) == table]
    array = numpy_helper.to_array(tensor).copy()
    if how == "zeroed":
        array[rows] = 0
    elif how == "permuted":
        array[rows] = array[[*rows[1:], rows[0]]]
    elif how == "multiplied":
        array[rows] *= array.dtype.type(1.1)
    else:
        array[rows, -1] += array.dtype.type(0.1)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


SPOILT = ["zeroed", "permuted", "multiplied", "moved"]


def behind(proto, *, name, operator, operand=None):
    """Put an operator behind the output of a name."""
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{operator} of {name}" if each == name else each for each in names]
    inputs = [f"{operator} of {name}"]
    if operand is not None:
        proto.graph.initializer.append(numpy_helper.from_array(np.float32(operand), "planted"))
        inputs.append("planted")
    proto.graph.node.append(helper.make_node(operator, inputs, [name]))


def twice(proto, *, name, other):
    """Return one output in the place of another."""
    behind(proto, name=name, operator="Identity")
    proto.graph.node[-1].input[0] = other


def swapped(proto, *, names):
    """Give two outputs each other's values."""
    other = dict(zip(names, reversed(names), strict=True))
    for node in proto.graph.node:
        for each in (node.input, node.output):
            each[:] = [other.get(name, name) for name in each]


def dropped(proto, *, name):
    """Leave out an output."""
    (value,) = [value for value in proto.graph.output if value.name == name]
    proto.graph.output.remove(value)


def resized(proto, *, sizes, where=("input", "output", "value_info")):
    """Give sizes other names, or fix them; a number is fixed at another."""
    for value in (value for kind in where for value in getattr(proto.graph, kind)):
        for size in value.type.tensor_type.shape.dim:
            new = sizes.get(size.dim_param or size.dim_value)
            if isinstance(new, int):
                size.dim_value = new
            elif new is not None:
                size.dim_param = new
