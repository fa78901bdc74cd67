"""What an int8 file quantizes, read out of its QuantizeLinear and DequantizeLinear nodes, and the same file without."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log10
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ..errors import InputError

Array = NDArray[Any]

SUFFIX = re.compile(r"_quantized(\.\d+)?$")
"""What codes of a weight are called behind the weight's own name, as onnxruntime's quantizer has it.

A bias that several layers add, each in steps of its own, has codes for each, with a number.
"""


@dataclass(frozen=True)
class Codes:
    """Whole numbers that stand for real ones, ``scale * (codes - zero)``, per tensor or along ``axis``."""

    scale: Array
    zero: Array
    axis: int = 0

    def along(self, array: Array, rank: int) -> Array:
        """Return a scale or zero point in a shape that broadcasts against a tensor of ``rank``."""
        if array.size == 1:
            return array.reshape(())
        return array.reshape([-1 if axis == self.axis % rank else 1 for axis in range(rank)])

    def fits(self, shape: tuple[int, ...] = ()) -> bool:
        """Whether these are whole numbers and steps above 0, one or as many as a tensor of ``shape`` has channels."""
        if self.scale.shape != self.zero.shape or self.zero.dtype.kind not in "iu":
            return False
        channels = shape[self.axis] if -len(shape) <= self.axis < len(shape) else 1
        many = self.scale.size == 1 or self.scale.shape == (channels,)
        return many and bool(np.isfinite(self.scale).all() and (self.scale > 0).all())

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest code."""
        kind = np.iinfo(self.zero.dtype)
        return int(kind.min), int(kind.max)

    def decoded(self, codes: Array) -> Array:
        """Return the real numbers that codes stand for."""
        scale, zero = (self.along(each, codes.ndim) for each in (self.scale, self.zero))
        return (codes.astype(np.float64) - zero.astype(np.float64)) * scale.astype(np.float64)


@dataclass(frozen=True)
class Stored:
    """A weight or bias that the file has as codes: the float tensor's name, and what decodes it."""

    name: str
    codes: Array
    by: Codes

    @property
    def decoded(self) -> Array:
        """What the codes stand for in float32, as runtimes compute it."""
        scale, zero = (self.by.along(each, self.codes.ndim) for each in (self.by.scale, self.by.zero))
        wide = self.codes.astype(np.int64) - zero.astype(np.int64)
        return np.asarray(wide.astype(np.float32) * scale, np.float32)


@dataclass(frozen=True)
class Pair:
    """A value of the graph that is rounded on its way: how the one node encodes it and how the others decode it."""

    by: Codes
    back: tuple[Codes, ...]
    decoded: tuple[str, ...]


class Quantized:
    """The quantized values of a model: ``pairs`` by the value that is rounded, ``stored`` by what decodes to."""

    def __init__(self, proto: onnx.ModelProto, folder: Path = Path()) -> None:
        self.proto, self._folder = proto, str(folder)
        self._tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.pairs: dict[str, Pair] = {}
        self.stored: dict[str, Stored] = {}
        self.odd: list[str] = []  # nodes that are no half of a pair and decode nothing stored
        encoded = {node.output[0]: node for node in proto.graph.node if node.op_type == "QuantizeLinear"}
        decoding: dict[str, list[onnx.NodeProto]] = {}
        for node in proto.graph.node:
            if node.op_type == "DequantizeLinear":
                decoding.setdefault(node.input[0], []).append(node)
        for value, nodes in decoding.items():
            if value in self._tensors:
                for node in nodes:
                    name = SUFFIX.sub("", value)
                    self.stored[node.output[0]] = Stored(name, self._array(value), self._codes(node))
            elif value not in encoded:
                self.odd += [node.output[0] for node in nodes]
        for value, node in encoded.items():
            back = decoding.get(value, [])
            if not back or node.input[0] in self.pairs:
                self.odd.append(node.output[0])
            else:
                ways = tuple(self._codes(each) for each in back)
                self.pairs[node.input[0]] = Pair(self._codes(node), ways, tuple(each.output[0] for each in back))

    def _array(self, name: str) -> Array:
        return numpy_helper.to_array(self._tensors[name], self._folder)

    def _codes(self, node: onnx.NodeProto) -> Codes:
        scale, zero = (*node.input[1:], "")[:2]
        if missing := [name for name in (scale, zero) if name and name not in self._tensors]:
            raise InputError(f"expected scales and zero points that the file stores, received {missing[0]}, computed")
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        steps = self._array(scale)
        return Codes(steps, self._array(zero) if zero else np.zeros(steps.shape, np.uint8), axis)

    @property
    def names(self) -> list[str]:
        """Everything that is quantized: pairs by the value, stored tensors by what decodes to."""
        return [*self.pairs, *self.stored]

    def without(self, weights: Mapping[str, Array], dropped: Collection[str] | None = None) -> onnx.ModelProto:
        """Return the model with ``dropped``, or all that is quantized, in float: weights are taken from ``weights``.

        A layer whose weight is in float reads what was not rounded: onnxruntime would round a weight, by one step for
        all channels, that it finds between what is.

        Raises `InputError` for a stored tensor whose float one is missing or of another shape.
        """
        return self._written(weights, self.names if dropped is None else dropped, rounding=False)

    def simulated(self, weights: Mapping[str, Array]) -> onnx.ModelProto:
        """Return the model with what is quantized computed in float: divided, rounded, clipped and multiplied.

        Its weights are what the file's codes stand for, to the bit: a difference of one rounding would move values to
        other codes, and in a deep network come to as much as all rounding.
        """
        return self._written(weights, self.names, rounding=True)

    def _written(self, weights: Mapping[str, Array], dropped: Collection[str], *, rounding: bool) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        graph = proto.graph
        nodes: list[onnx.NodeProto] = []
        rounded = {output: value for value, pair in self.pairs.items() for output in pair.decoded}
        renamed: dict[str, str] = {}
        gone: set[str] = set()
        for value in (name for name in self.pairs if name in dropped):
            for output in self.pairs[value].decoded:
                gone.add(output)
                if not rounding:
                    is_output = output in {each.name for each in graph.output}
                    renamed |= {value: output} if is_output else {output: value}
        present = set(self._tensors)
        for name in (name for name in self.stored if name in dropped):
            gone.add(name)
            stored, array = self.stored[name], self.float_of(name, weights)
            if not rounding:
                renamed[name] = stored.name
                if stored.name in present:
                    continue
                present.add(stored.name)
            tensor = stored.decoded if rounding else array
            graph.initializer.append(numpy_helper.from_array(tensor, name if rounding else stored.name))
        for node in graph.node:
            if node.op_type == "QuantizeLinear" and node.input[0] in self.pairs and node.input[0] in dropped:
                continue
            if node.op_type != "DequantizeLinear" or node.output[0] not in gone:
                nodes.append(node)
                continue
            if rounding and node.output[0] in rounded:
                source = rounded[node.output[0]]
                made, constants = _rounding(source, node.output[0], self.pairs[source].by)
                nodes += made
                graph.initializer.extend(constants)
        for node in nodes:
            if not rounding and len(node.input) > 1 and node.input[1] in gone and node.input[0] in rounded:
                node.input[0] = rounded[node.input[0]]
            for names in (node.input, node.output):
                names[:] = [renamed.get(name, name) for name in names]
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)
        del graph.value_info[:]
        _prune(graph)
        return proto

    def float_of(self, name: str, weights: Mapping[str, Array]) -> Array:
        """Return the float tensor of a stored one; raises `InputError` if there is none of its shape."""
        stored = self.stored[name]
        array = weights.get(stored.name)
        if array is None or array.shape != stored.codes.shape:
            received = "none" if array is None else f"one of shape {array.shape}"
            raise InputError(
                f"expected {stored.name} of shape {stored.codes.shape} in the float file of an int8 file, "
                f"received {received}; give the one that it was made of"
            )
        return array


def _rounding(value: str, output: str, by: Codes) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Return nodes that round a value to what codes stand for, and their constants."""
    low, high = by.limits
    zero = float(by.zero)
    numbers = {"scale": float(by.scale), "low": low - zero, "high": high - zero}
    constants = [
        numpy_helper.from_array(np.array(number, np.float32), f"{output}/{key}") for key, number in numbers.items()
    ]
    names = [f"{output}/{key}" for key in ("divided", "rounded", "clipped")]
    steps = [("Div", [value, f"{output}/scale"]), ("Round", [names[0]])]
    steps += [("Clip", [names[1], f"{output}/low", f"{output}/high"]), ("Mul", [names[2], f"{output}/scale"])]
    return [helper.make_node(op, taken, [made]) for (op, taken), made in
            zip(steps, [*names, output], strict=True)], constants  # fmt: skip


def _prune(graph: onnx.GraphProto) -> None:
    """Take out the initializers that nothing reads any more."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    read |= {name for node in graph.node for a in node.attribute for g in [a.g, *a.graphs] for name in _outer(g)}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    kept = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _outer(graph: onnx.GraphProto) -> Iterable[str]:
    """Yield every name that a graph within a node reads."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from _outer(inner)
    yield from (value.name for value in graph.output)


def weights_of(path: Path) -> dict[str, Array]:
    """Return the float32 tensors that a file, already checked, stores, by name."""
    proto = onnx.load(str(path))
    floats = (tensor for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in floats}


def comparable(found: Sequence[Array], exact: Sequence[Array]) -> bool:
    """Whether an output has noise that can be measured: real numbers, as many with rounding as without."""
    return exact[0].dtype.kind == "f" and [each.shape for each in found] == [each.shape for each in exact]


def decibels(found: Sequence[Array], exact: Sequence[Array]) -> float:
    """Return how far the energy of the difference is below that of what is exact, about the mean of all its numbers."""
    first, second = (np.concatenate([each.astype(np.float64).ravel() for each in arrays]) for arrays in (found, exact))
    about = second - second.mean() if second.size > 1 else second
    noise = float(np.square(first - second).sum() / max(np.square(about).sum(), np.finfo(np.float32).tiny))
    return inf if noise == 0 else -10 * log10(noise)
