"""What a PyTorch model and its training hold, to be kept and given back."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..training import Array, State
from .average import Average


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every entry of the model's state, by name."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def save_state(optimizer: Any, average: Average) -> dict[str, Array]:
    """Return what a training holds beside the model: that of Accelerate's optimizer, its scaler, and the average."""
    found = {
        f"optimizer.{index}.{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }
    found |= {f"average.{index}": value for index, value in enumerate(average.values)}
    arrays = {name: value.detach().cpu().numpy().copy() for name, value in found.items()}
    if (scaler := optimizer.scaler) is not None:
        arrays |= {f"scaler.{name}": np.asarray(value) for name, value in scaler.state_dict().items()}
    return arrays


def load_state(optimizer: Any, average: Average, state: State) -> None:
    """Take what `save_state` returned."""
    loaded: dict[int, dict[str, Tensor]] = {}
    scale: dict[str, Any] = {}
    for key, value in state.items():
        kind, _, name = key.partition(".")
        if kind == "scaler":
            scale[name] = value.item()
        elif kind == "average":
            average.values[int(name)].copy_(torch.from_numpy(value))
        else:
            index, _, name = name.partition(".")
            loaded.setdefault(int(index), {})[name] = torch.from_numpy(np.array(value))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": loaded})
    if optimizer.scaler is not None and scale:
        optimizer.scaler.load_state_dict(scale)
