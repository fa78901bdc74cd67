"""Faults that are planted in an ONNX file: in its weights, in rows of its tables, in its outputs, in its sizes.

Each is drawn at random, the same in every run. What has no effect is no fault: weights and rows count where an output
or layer moves on inputs that are valid, outputs and sizes where the file says something else of them.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from normswap.verification.runtime import session

Array = NDArray[Any]
Change = Callable[[onnx.ModelProto, random.Random, Mapping[str, Array]], str | None]
"""Puts a fault into a file, which a feed fits, and returns where, or None if the file has nothing of the kind."""

FEW = 3
"""Most rows of a table that a fault is in."""

# ---------------------------------------------------------------------------------------------------------- weights


def change(draw: Callable[[Array, random.Random], Array], *endings: str) -> Change:
    """Return a fault that puts ``draw`` of it in the place of a random float tensor, of a name that ends like one."""

    def apply(proto: onnx.ModelProto, rng: random.Random, feed: Mapping[str, Array]) -> str | None:
        tensors = [t for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT]
        tensors = [t for t in tensors if t.name.endswith(endings) and numpy_helper.to_array(t).any()]
        if not tensors:
            return None
        tensor = rng.choice(tensors)
        put(tensor, draw(numpy_helper.to_array(tensor).copy(), rng))
        return str(tensor.name)

    return apply


def put(tensor: TensorProto, array: Array) -> None:
    """Give a tensor other values."""
    tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))


def nan_somewhere(array: Array, rng: random.Random) -> Array:
    """Make one value NaN."""
    array.flat[rng.randrange(array.size)] = np.nan
    return array


def eps_a_hundredfold(proto: onnx.ModelProto, rng: random.Random, feed: Mapping[str, Array]) -> str | None:
    """Raise ε of one norm that has it as an attribute or within a constant, by the 9.9e-4 that a hundredfold is."""
    nodes = [node for node in proto.graph.node if node.op_type == "InstanceNormalization"]
    if not nodes:
        return change(lambda array, _: array + 9.9e-4, "/var_of_batch", "/eps")(proto, rng, feed)
    node = rng.choice(nodes)
    for attribute in node.attribute:
        if attribute.name == "epsilon":
            attribute.f += 9.9e-4
    return str(node.name)


KERNELS = ("weight", "kernel", "/gamma")
WEIGHTS: dict[str, Change] = {
    "weight x1.01": change(lambda array, _: array * 1.01, *KERNELS),
    "weight in float16": change(lambda array, _: array.astype(np.float16), *KERNELS),
    "running variance x0.99": change(lambda array, _: array * 0.99, "/var_of_batch", "/var"),
    "ε + 9.9e-4": eps_a_hundredfold,
    "NaN": change(nan_somewhere, *KERNELS, "/beta", "bias"),
}

# ------------------------------------------------------------------------------------------------- rows of a table


def tables(proto: onnx.ModelProto) -> dict[str, str]:
    """Return the tables that rows are gathered from, each with the value that chooses them."""
    stored = {tensor.name for tensor in proto.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    gathers = [node for node in proto.graph.node if node.op_type == "Gather" and node.input[0] in stored]
    return {node.input[0]: node.input[1] for node in gathers}


def chosen(proto: onnx.ModelProto, value: str, feed: Mapping[str, Array]) -> Array:
    """Return what a value of the graph is for a feed: which rows are gathered."""
    if value in feed:
        return feed[value]
    content = (
        proto.SerializeToString()
        + onnx.ModelProto(graph=onnx.GraphProto(output=[onnx.ValueInfoProto(name=value)])).SerializeToString()
    )
    found: Any = session(content, optimised=False).run([value], dict(feed))
    return np.asarray(found[0])


def rows(spoil: Callable[[Array, Sequence[int], random.Random], Any], *, reached: bool) -> Change:
    """Return a fault in a few rows of a table: such as the feed reaches, or any."""

    def apply(proto: onnx.ModelProto, rng: random.Random, feed: Mapping[str, Array]) -> str | None:
        choices = tables(proto)
        if not choices:
            return None
        name = rng.choice(sorted(choices))
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
        array = numpy_helper.to_array(tensor).copy()
        from_ = np.unique(chosen(proto, choices[name], feed)).tolist() if reached else range(len(array))
        few = rng.sample(sorted(from_), min(len(from_), rng.randint(1, FEW)))
        spoil(array, few, rng)
        put(tensor, array)
        return f"{name}{few}"

    return apply


def zero(array: Array, few: Sequence[int], rng: random.Random) -> None:
    """Zero the rows."""
    array[few] = 0


def permute(array: Array, few: Sequence[int], rng: random.Random) -> None:
    """Put each row where the next one is, the last where any other is."""
    ring = [*few, rng.choice([row for row in range(len(array)) if row not in few])]
    array[ring] = array[[*ring[1:], ring[0]]]


def perturb(array: Array, few: Sequence[int], rng: random.Random) -> None:
    """Multiply the rows by 1.01."""
    array[few] *= 1.01


def touch(array: Array, few: Sequence[int], rng: random.Random) -> None:
    """Move one number of each row by a hundredth of the table's largest."""
    for row in few:
        array[row, rng.randrange(array.shape[1])] += 0.01 * np.abs(array).max()


SPOILT = {"rows zeroed": zero, "rows permuted": permute, "rows x1.01": perturb, "rows touched": touch}
ROWS: dict[str, Change] = {
    f"{how}, {which}": rows(spoil, reached=which == "reached")
    for how, spoil in SPOILT.items()
    for which in ("reached", "any")
}

# ---------------------------------------------------------------------------------------------------------- outputs


def renamed(proto: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Rename values in nodes; the outputs that the graph declares keep their names."""
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def several(proto: onnx.ModelProto) -> bool:
    """Whether a file has three outputs or more."""
    return len(proto.graph.output) > 2


def drop(proto: onnx.ModelProto, rng: random.Random, feed: Mapping[str, Array]) -> str | None:
    """Leave out one output."""
    if not several(proto):
        return None
    return str(proto.graph.output.pop(rng.randrange(len(proto.graph.output))).name)


def alike(proto: onnx.ModelProto, rng: random.Random) -> tuple[Any, Any] | None:
    """Return two outputs, of one shape and type where there are such."""
    if not several(proto):
        return None
    pairs = [(a, b) for i, a in enumerate(proto.graph.output) for b in proto.graph.output[i + 1 :]]
    same = [(a, b) for a, b in pairs if a.type == b.type]
    return rng.choice(same or pairs)


def swap(*, declared: bool) -> Change:
    """Return a fault that gives two outputs each other's values, ``declared`` as they are then or as they were."""

    def apply(proto: onnx.ModelProto, rng: random.Random, feed: Mapping[str, Array]) -> str | None:
        pair = alike(proto, rng)
        if pair is None:
            return None
        a, b = pair
        renamed(proto, {a.name: b.name, b.name: a.name})
        if declared:
            first, second = onnx.TypeProto.FromString(b.type.SerializeToString()), a.type
            b.type.CopyFrom(second)
            a.type.CopyFrom(first)
        return f"{a.name}, {b.name}"

    return apply


def reorder(proto: onnx.ModelProto, rng: random.Random, feed: Mapping[str, Array]) -> str | None:
    """Give two outputs each other's places."""
    if not several(proto):
        return None
    outputs = list(proto.graph.output)
    i, j = rng.sample(range(len(outputs)), 2)
    outputs[i], outputs[j] = outputs[j], outputs[i]
    del proto.graph.output[:]
    proto.graph.output.extend(outputs)
    return f"{i}, {j}"


def behind(operator: str, operand: float) -> Change:
    """Return a fault that puts one operator more behind an output of floats."""

    def apply(proto: onnx.ModelProto, rng: random.Random, feed: Mapping[str, Array]) -> str | None:
        floats = [value for value in proto.graph.output if value.type.tensor_type.elem_type == TensorProto.FLOAT]
        if not several(proto) or not floats:
            return None
        name = rng.choice(floats).name
        renamed(proto, {name: f"{name}_before"})
        proto.graph.initializer.append(numpy_helper.from_array(np.float32(operand), "planted"))
        proto.graph.node.append(helper.make_node(operator, [f"{name}_before", "planted"], [name]))
        return str(name)

    return apply


def duplicate(proto: onnx.ModelProto, rng: random.Random, feed: Mapping[str, Array]) -> str | None:
    """Return one output in the place of another."""
    pair = alike(proto, rng)
    if pair is None:
        return None
    a, b = (value.name for value in rng.sample(pair, 2))
    renamed(proto, {b: f"{b}_before"})
    proto.graph.node.append(helper.make_node("Identity", [f"{b}_before" if a == b else a], [b]))
    return f"{a} as {b}"


def append(proto: onnx.ModelProto, rng: random.Random, feed: Mapping[str, Array]) -> str | None:
    """Return one output once more, under another name."""
    if not several(proto):
        return None
    value = rng.choice(proto.graph.output)
    proto.graph.node.append(helper.make_node("Identity", [value.name], ["planted"]))
    proto.graph.output.append(value)
    proto.graph.output[-1].name = "planted"
    return str(value.name)


OUTPUTS: dict[str, Change] = {
    "output dropped": drop,
    "outputs swapped": swap(declared=False),
    "outputs swapped and declared": swap(declared=True),
    "outputs in another order": reorder,
    "output x1.001": behind("Mul", 1.001),
    "output + 0.1": behind("Add", 0.1),
    "output twice": duplicate,
    "output more": append,
}

# ------------------------------------------------------------------------------------------------------------ sizes


def dimensions(values: Sequence[onnx.ValueInfoProto]) -> list[Any]:
    """Return all dimensions that values declare, in order."""
    return [size for value in values for size in value.type.tensor_type.shape.dim]


def named(proto: onnx.ModelProto, *, batch: bool) -> list[str]:
    """Return the names of the inputs' sizes that are free: that of the first, or all others."""
    names = list(dict.fromkeys(size.dim_param for size in dimensions(proto.graph.input) if size.dim_param))
    return names[:1] if batch else names[1:]


def fix(*, batch: bool, outputs: bool) -> Change:
    """Return a fault that fixes a free size at what it is in the feed, in the inputs alone or in all there is."""

    def apply(proto: onnx.ModelProto, rng: random.Random, feed: Mapping[str, Array]) -> str | None:
        names = named(proto, batch=batch)
        if not names:
            return None
        name = rng.choice(names)
        inputs = [
            (size, feed[value.name].shape[axis])
            for value in proto.graph.input
            for axis, size in enumerate(value.type.tensor_type.shape.dim)
        ]
        number = next(own for size, own in inputs if size.dim_param == name)
        more = dimensions([*proto.graph.output, *proto.graph.value_info]) if outputs else []
        for size in [*dimensions(proto.graph.input), *more]:
            if size.dim_param == name:
                size.dim_value = number
        return f"{name}={number}"

    return apply


def rename(proto: onnx.ModelProto, names: Mapping[str, str], *, outputs: bool) -> None:
    """Rename free sizes of the inputs, or of all values."""
    more = [*proto.graph.output, *proto.graph.value_info] if outputs else []
    for size in dimensions([*proto.graph.input, *more]):
        if size.dim_param in names:
            size.dim_param = names[size.dim_param]


def share(*, outputs: bool) -> Change:
    """Return a fault that gives two free sizes one name."""

    def apply(proto: onnx.ModelProto, rng: random.Random, feed: Mapping[str, Array]) -> str | None:
        names = [*named(proto, batch=True), *named(proto, batch=False)]
        if len(names) < 2:
            return None
        kept, other = rng.sample(names, 2)
        rename(proto, {other: kept}, outputs=outputs)
        return f"{other} as {kept}"

    return apply


def exchange(proto: onnx.ModelProto, rng: random.Random, feed: Mapping[str, Array]) -> str | None:
    """Give two free sizes of the inputs each other's names."""
    names = [*named(proto, batch=True), *named(proto, batch=False)]
    if len(names) < 2:
        return None
    a, b = rng.sample(names, 2)
    rename(proto, {a: b, b: a}, outputs=False)
    return f"{a}, {b}"


def exchange_within(proto: onnx.ModelProto, rng: random.Random, feed: Mapping[str, Array]) -> str | None:
    """Give two free sizes of one output each other's names."""
    found = [[s for s in dimensions([v]) if s.dim_param] for v in proto.graph.output]
    found = [sizes for sizes in found if len({size.dim_param for size in sizes}) > 1]
    if not found:
        return None
    a, b = rng.sample(rng.choice(found), 2)
    a.dim_param, b.dim_param = b.dim_param, a.dim_param
    return f"{a.dim_param}, {b.dim_param}"


def other_size(kind: str) -> Change:
    """Return a fault that declares one more than there is, of a fixed size of an input or output."""

    def apply(proto: onnx.ModelProto, rng: random.Random, feed: Mapping[str, Array]) -> str | None:
        values = proto.graph.input if kind == "input" else proto.graph.output
        sizes = [size for size in dimensions(values) if size.dim_value]
        if not sizes:
            return None
        size = rng.choice(sizes)
        size.dim_value += 1
        del proto.graph.value_info[:]
        return f"{kind}: {size.dim_value}"

    return apply


def fix_output(proto: onnx.ModelProto, rng: random.Random, feed: Mapping[str, Array]) -> str | None:
    """Declare a free size of an output to be 2."""
    sizes = [size for size in dimensions(proto.graph.output) if size.dim_param]
    if not sizes:
        return None
    size = rng.choice(sizes)
    name = size.dim_param
    size.dim_value = 2
    return str(name)


SIZES: dict[str, Change] = {
    "batch fixed": fix(batch=True, outputs=True),
    "batch of the inputs fixed": fix(batch=True, outputs=False),
    "free size fixed": fix(batch=False, outputs=True),
    "free size of the inputs fixed": fix(batch=False, outputs=False),
    "one name for two sizes": share(outputs=True),
    "one name for two sizes of the inputs": share(outputs=False),
    "names of inputs' sizes swapped": exchange,
    "names of an output's sizes swapped": exchange_within,
    "input's size + 1": other_size("input"),
    "output's size + 1": other_size("output"),
    "output's size fixed": fix_output,
}

CLASSES: dict[str, dict[str, Change]] = {"weights": WEIGHTS, "rows": ROWS, "outputs": OUTPUTS, "sizes": SIZES}
