"""What a Keras model and its training hold, to be kept and given back."""

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from ..training import Array, State
from .variables import assign, copied

if TYPE_CHECKING:
    from .average import Average


def shapes(model: keras.Model) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of the model, by path."""
    return {weight.path: tuple(weight.shape) for weight in model.weights}


def save_state(optimizer: Any, average: "Average") -> dict[str, Array]:
    """Return what a training holds beside the model: that of the optimizer and the average."""
    found = {f"optimizer.{index}": copied(variable) for index, variable in enumerate(optimizer.variables)}
    return found | {f"average.{index}": value.copy() for index, value in enumerate(average.values)}


def load_state(optimizer: Any, average: "Average", state: State) -> None:
    """Take what `save_state` returned."""
    assign(optimizer.variables, [state[f"optimizer.{index}"] for index in range(len(optimizer.variables))])
    average.values = [np.array(state[f"average.{index}"]) for index in range(len(average.values))]
