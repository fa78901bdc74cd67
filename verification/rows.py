"""Rows of tables, such as an embedding's, of which no few inputs reach all: each is held to the model's own.

A file looks rows up and does not compute them, so they are compared as they are stored, by a few products of each row
with random numbers. These are kept of a table that is too large to be stored beside a file.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from .file import OnnxFile

Array = NDArray[np.floating]

_PRODUCTS = 4
_PASSING = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def marks(table: Array) -> NDArray[np.float64]:
    """Return of each row of a table (R, ...) its largest value, and products with random numbers, (R, 5)."""
    flat = table.reshape(len(table), -1).astype(np.float64)
    random = np.random.default_rng(0).standard_normal((flat.shape[1], _PRODUCTS))
    with np.errstate(all="ignore"):
        return np.column_stack([np.abs(flat).max(1, initial=0.0), flat @ random])


def row_problems(file: OnnxFile, expected: Mapping[str, NDArray[np.float64]], bound: float) -> list[str]:
    """Return which tables of a file have rows other than the model's, whose ``marks`` are expected by its layers.

    ``bound`` is the largest difference, relative to each row's largest value.
    """
    least = float(np.finfo(np.float16).smallest_subnormal) if file.half else 0.0
    problems = []
    called = [(site.partition("#")[0], value) for site, value in file.sites.items()]
    found = {(layer, _table(file, value)) for layer, value in called if layer in expected}
    constants = {tensor.name: tensor for tensor in file.proto.graph.initializer}
    for layer, name in sorted((layer, name) for layer, name in found if name in constants):
        wanted, own = expected[layer], marks(numpy_helper.to_array(constants[name], str(file.path.parent)))
        if own.shape != wanted.shape:
            problems.append(f"expected the table of {layer} of {len(wanted)} rows, received one of {len(own)}")
            continue
        with np.errstate(all="ignore"):
            right = np.abs(own - wanted).max(1) <= bound * wanted[:, 0] + least
        if not right.all():
            others = np.flatnonzero(~right)
            problems.append(
                f"expected the rows of {layer}, received others in {len(others)} of {len(right)}: "
                f"{', '.join(map(str, others[:8]))}{', …' if len(others) > 8 else ''}"
            )
    return problems


def _table(file: OnnxFile, value: str) -> str:
    """Return the table that a value's rows are taken from as they are, nothing where there is no such."""
    makers: dict[str, Any] = {name: node for node in file.proto.graph.node for name in node.output}
    chosen = False
    while (node := makers.get(value)) is not None:
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        if node.op_type == "Gather" and axis == 0 and not chosen:
            chosen = True
        elif node.op_type not in _PASSING:
            return ""
        value = node.input[0]
    return value if chosen else ""
