"""Values of Keras variables, read and given back."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from ..training import Array


def assign(variables: Sequence[Any], values: Sequence[Array]) -> None:
    """Give each variable its value."""
    for variable, value in zip(variables, values, strict=False):
        variable.assign(value)


def copied(variable: Any) -> Array:
    """Return the value of a variable, which on the torch backend would go on changing."""
    return np.array(ops.convert_to_numpy(variable))
