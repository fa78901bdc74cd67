"""What a file says of the sizes of its inputs and outputs: those that its export left open, and one size for a name.

A name that stands for two sizes, or a size that was fixed, breaks nothing in a run of those sizes; runtimes that plan
by what is declared, and callers of other sizes, find out.
"""

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray

from ..formats.fields import read
from .file import OnnxFile

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Mult: operator.mul,
    ast.Sub: operator.sub,
}  # fmt: skip


def changed(file: OnnxFile) -> list[str]:
    """Return which inputs take less, or have other names for what is open, than the file says they were written with.

    A size that was fixed may have been opened since: what the file computes then is seen in its runs.
    """
    told = read(dict[str, list[int | str | None]], file.metadata.get("inputs", {}), file.told("inputs"))
    problems = []
    for value in file.inputs:
        own = declared(value)
        before = told.get(value.name, own)
        kept = all(a == b or (isinstance(a, int) and not isinstance(b, int)) for a, b in zip(before, own, strict=False))
        if len(before) != len(own) or not kept:
            problems.append(
                f"expected the input {value.name} ({_listed(before)}), as which it was exported, "
                f"received ({_listed(own)})"
            )
    return problems


def contradictions(values: Sequence[onnx.ValueInfoProto], arrays: Mapping[str, NDArray[Any]]) -> Iterator[str]:
    """Yield where the sizes of one run are not what the inputs and then the outputs of a graph declare together.

    A name is one size, the first that it stands for; sums and products of names are what they come to.
    """
    known: dict[str, tuple[int, str]] = {}
    for value in values:
        for name, size in zip(declared(value), arrays[value.name].shape, strict=False):
            if not isinstance(name, str):
                continue
            if name not in known and (computed := _computed(name, known)) is not None:
                known[name] = computed, "the inputs"
            before, where = known.setdefault(name, (size, value.name))
            if before != size:
                yield (
                    f"expected one size for each name, received {name} = {before} by {where} and {size} in {value.name}"
                )


def declared(value: onnx.ValueInfoProto) -> list[int | str | None]:
    """Return the sizes that a graph declares of a value: numbers, names, or None for what is open without a name."""
    sizes = value.type.tensor_type.shape.dim
    return [size.dim_value if size.HasField("dim_value") else size.dim_param or None for size in sizes]


def _computed(name: str, known: Mapping[str, tuple[int, str]]) -> int | None:
    """Return what a name like ``(height - 1)//2 + 1`` comes to, None where it is no such sum of names known."""

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant):
            return int(node.value)  # type: ignore[arg-type]
        return known[node.id][0] if isinstance(node, ast.Name) else int("")

    try:
        tree = ast.parse(name, mode="eval").body
        return value(tree) if isinstance(tree, ast.BinOp) else None
    except (SyntaxError, KeyError, TypeError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _listed(sizes: Sequence[Any]) -> str:
    return ", ".join("?" if size is None else str(size) for size in sizes)
