"""A layer's arrays by the names of its parts, and what is expected of their shapes and values."""

from collections.abc import Mapping, Sequence
from math import isclose
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, listed

Array = NDArray[Any]
Parts = Mapping[str, Array]
Shapes = dict[str, tuple[int, ...]]


def expect_shapes(parts: Parts, shapes: Shapes) -> None:
    """Raise one `InputError` for all parts that are missing, unexpected or of another shape."""
    problems = [f"{part} is missing" for part in shapes if part not in parts]
    problems += [f"{part} is unexpected" for part in parts if part not in shapes]
    problems += [
        f"{part} is of shape {parts[part].shape} instead of {shape}"
        for part, shape in shapes.items()
        if part in parts and parts[part].shape != shape
    ]
    if problems:
        raise InputError(", ".join(problems))


def expect_values(parts: Parts) -> None:
    """Raise `InputError` for a part that is not of floating point, not finite, or a negative variance."""
    for part, array in parts.items():
        if array.dtype.kind != "f":
            raise InputError(f"{part} is of dtype {array.dtype} instead of a floating-point one")
        if bad := int(np.count_nonzero(~np.isfinite(array))):
            raise InputError(f"{part} has {bad} values that are not finite")
        if part in ("running_var", "moving_variance") and (bad := int(np.count_nonzero(array < 0))):
            raise InputError(f"{part} has {bad} values below 0")


def require_none(problems: Sequence[str], expectation: str) -> None:
    """Raise one `InputError` that says ``expectation`` and lists the problems, if there are any."""
    if problems:
        raise InputError(f"{expectation}:\n{listed(problems)}")


def require_eps(layers: Mapping[str, tuple[float, Sequence[float]]]) -> None:
    """Raise `InputError` for layers by name whose ε is none of those that follow it."""
    require_none(
        [
            f"{name}: eps={eps:g} instead of {' or '.join(f'{each:g}' for each in trained)}"
            for name, (eps, trained) in layers.items()
            if not any(isclose(eps, each, rel_tol=1e-5) for each in trained)
        ],
        "expected layers with the eps that the network was trained with, received others; build MODEL with that, or "
        "tell what it was trained with: load_weights(..., eps=EPS)",
    )
