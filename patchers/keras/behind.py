"""Which norms an exported file is rid of: those whose input is a line of what a linear operation computes.

TensorFlow's graph of a call tells what lies between the two: what moves values about, and constants that are added or
multiplied. What it does not tell for certain is not known.
"""

from collections.abc import Collection
from typing import Any

import numpy as np

COPIES = {"Identity", "IdentityN", "StopGradient", "PreventGradient"}
MOVES = {"Reshape", "Squeeze", "ExpandDims", "Transpose"}
"""What only moves values about; whether the channels stay together is seen by moving their numbers."""

SHAPES = {"Shape", "ShapeN", "Size", "Rank"}
"""What reads no values."""

_LINEAR = {"Conv2D", "Conv3D", "DepthwiseConv2dNative", "MatMul", "BatchMatMul", "BatchMatMulV2"}
_TRANSPOSED = {"Conv2DBackpropInput", "Conv3DBackpropInputV2"}
_ARITHMETIC = {"Add", "AddV2", "BiasAdd", "Mul", "RealDiv", "Sub"}
_UNCERTAIN = {"Cast", "Gather", "GatherV2", "Neg", "Slice", "StridedSlice"}
"""What a file may have such a form of that the norm goes through it, or not."""


def goes_in(tensor: Any, axis: int, inner: Collection[str], ends: Collection[str]) -> bool | None:
    """Return whether what a norm is given is a line of what a linear operation computes, None where it is not known.

    ``axis`` is that of the norm's channels, ``inner`` are its own operations, and ``ends`` what the model returns.
    """
    way: list[Any] = []
    certain, norm_rank = True, len(tensor.shape)
    while True:
        readers = {each.name for each in tensor.consumers() if each.type not in SHAPES} - set(inner)
        if len(readers) > (1 if way else 0) or tensor.name in ends:
            return False
        operation = tensor.op
        way.append(operation)
        if operation.type in COPIES | MOVES:
            tensor = operation.inputs[operation.outputs.index(tensor) if operation.type in COPIES else 0]
        elif operation.type in _ARITHMETIC:
            constant = [_is_constant(each) for each in operation.inputs]
            if sum(constant) != 1 or (operation.type == "RealDiv" and constant[0]):
                return False
            other = operation.inputs[constant.index(True)].shape
            certain &= other.is_fully_defined() and all(size == 1 for size in other[:-1])
            tensor = operation.inputs[constant.index(False)]
        elif operation.type in _UNCERTAIN:
            certain, tensor = False, operation.inputs[0]
        else:
            break
        inner = ()
    if operation.type in _LINEAR:
        constant = [_is_constant(each) for each in operation.inputs]
        fits = constant == [False, True]
    else:
        fits = operation.type in _TRANSPOSED and _is_constant(operation.inputs[1])
    if not fits:
        return False
    place: int | None = len(operation.outputs[0].shape) - 1
    if b"NC" in _format(operation):
        place = 1
    for each in reversed(way[:-1]):
        if each.type in MOVES and place is not None:
            place = moved(each, place)
    return True if certain and place == axis % norm_rank else None


def moved(operation: Any, axis: int) -> int | None:
    """Return where the channels are after an operation has moved them, None if they are not together."""
    import tensorflow as tf

    before, after = operation.inputs[0].shape, operation.outputs[0].shape
    if not (before.is_fully_defined() and after.is_fully_defined()):
        return None
    shape = [1] * len(before)
    shape[axis] = -1
    numbers = np.broadcast_to(np.arange(before[axis]).reshape(shape), before)
    if operation.type == "Transpose":
        order = tf.get_static_value(operation.inputs[1])
        if order is None:
            return None
        numbers = numbers.transpose(order)
    else:
        numbers = numbers.reshape(after)
    for place, size in enumerate(after):
        if size == before[axis]:
            shape = [1] * len(after)
            shape[place] = -1
            if (numbers == np.arange(size).reshape(shape)).all():
                return place
    return None


def _is_constant(tensor: Any) -> bool:
    """Whether a tensor is what the model holds, or is computed of that alone."""
    operation = tensor.op
    if operation.type == "Placeholder":
        return any(tensor is held for _, held in tensor.graph.captures)
    return all(map(_is_constant, operation.inputs))


def _format(operation: Any) -> bytes:
    names = {name for name in operation.node_def.attr if name == "data_format"}
    return bytes(operation.get_attr("data_format")) if names else b""
