"""Which sizes of a model's inputs stay open in the file, and what they are called."""

import re
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from ..frameworks.names import unique

Sizes = Sequence[int | None]
Open = Mapping[tuple[int, int], str]
"""The names of open sizes, by the number of the input and the axis."""

BATCH = "batch"


def wanted(names: Sequence[str], shapes: Sequence[Sizes], *, dynamic: bool = False) -> Open:
    """Return a name for every first size of the inputs, with ``dynamic`` for every size behind the channels, too.

    Sizes of one meaning have one name where they are equal in the example, and another one where they are not: a graph
    has more edges than nodes. A first size of 1 beside other ones is no batch, and stays.
    """
    found: dict[tuple[int, int], str] = {}
    given: dict[tuple[str, int | None], str] = {}
    for index, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        for axis in [0, *range(2, len(shape) if dynamic else 0)][: len(shape)]:
            meaning = _meaning(axis, len(shape))
            first = not any(other == meaning for other, _ in given)
            if axis == 0 and shape[0] == 1 and not first and (meaning, 1) not in given:
                continue
            label = meaning if first else label_of(name, axis)
            found[index, axis] = given.setdefault((meaning, shape[axis]), label)
    return found


def label_of(name: str, axis: int) -> str:
    """Return what an input's own size is called, which torch wants to be an identifier."""
    return re.sub(r"\W|^(?=\d)", "_", f"{name}_dim_{axis}")


def traced_sizes(shapes: Sequence[Sequence[int]], open_sizes: Open) -> list[tuple[int, ...]]:
    """Return the shapes to trace with: a batch of one, which would be taken for a constant, is made larger.

    It is made as large as no other first size that is open, so that the two stay apart.
    """
    others = {shapes[index][0] for index, axis in open_sizes if axis == 0}
    larger = next(size for size in range(2, len(others) + 3) if size not in others)
    return [
        (larger, *shape[1:]) if (index, 0) in open_sizes and shape[0] == 1 else tuple(shape)
        for index, shape in enumerate(shapes)
    ]


def apart(open_sizes: Open) -> Open:
    """Return the sizes with a name of its own for each but the first of those that share one.

    Sizes that are equal in an example by chance are told apart so: nodes and edges, or time and samples.
    """
    names: set[str] = set()
    found: dict[tuple[int, int], str] = {}
    for place, name in open_sizes.items():
        found[place] = unique(name, names)
        names.add(found[place])
    return found


def closed(graph: ir.Graph, open_sizes: Open) -> list[tuple[int, int]]:
    """Return which of the sizes that were to be open the graph does not leave open, or only for some sizes."""
    names = set(open_sizes.values())
    return [(index, axis) for index, axis in open_sizes if shape_of(graph.inputs[index])[axis] not in names]


def explained(names: Sequence[str], shapes: Sequence[Sizes], fixed: Sequence[tuple[int, int]]) -> list[str]:
    """Return what is to be known of sizes that the model fixes."""
    return [
        f"the model fixes size {axis} of {names[index]}: the file takes {shapes[index][axis]} alone"
        for index, axis in sorted(fixed)
    ]


def _meaning(axis: int, rank: int) -> str:
    if axis == 0:
        return BATCH
    return ("height", "width")[axis - 2] if rank == 4 else f"size_{axis}"


def shape_of(value: ir.Value) -> list[int | str | None]:
    """Return the sizes that a graph tells of a value, names for those that are open."""
    return [size if isinstance(size, int) else size.value for size in value.shape or ()]
