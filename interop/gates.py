"""The gates of Switchable Normalizations in a file of weights, for which no network has to be built."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import Array
from .checkpoint import Checkpoint, read_checkpoint
from .keras_h5 import KerasWeights
from .switchablenorms import from_switchablenorms

Gates = dict[str, tuple[Array, Array]]


def gates_in(path: Path) -> Gates | None:
    """Return the gates in a checkpoint by layer in its order, those of the mean and those of the variance.

    The file is one of switchablenorms, a state dict of a model with this library's layers, or HDF5 of keras-switchnorm.
    Gates are as `normswap.finetune.run.figures.gates` has them, and there are none in other weights. A file of Keras 3
    gives None: its gates are told by the model in it alone.

    Raises as `read_checkpoint` does.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.layers is not None:
        return _of_layers(checkpoint.layers)
    if checkpoint.framework == "keras":
        return None
    return _of_state(checkpoint)


def _of_layers(layers: KerasWeights) -> Gates:
    return {
        name: (_shares(each.arrays["mean_weight"]), _shares(each.arrays["var_weight"]))
        for name, each in layers.items()
        if each.kind == "sn"
    }


def _of_state(checkpoint: Checkpoint) -> Gates:
    from .into_torch import as_array

    assert checkpoint.state is not None
    state: Mapping[str, Any] = {name: as_array(tensor) for name, tensor in checkpoint.state.items()}
    if checkpoint.system == "switchablenorms":
        state = from_switchablenorms(state)
    found: Gates = {}
    names = (
        sorted(state, key=_by_number) if checkpoint.path.suffix == ".safetensors" else state
    )  # which sorts by letters
    for name in names:
        stem, _, part = name.rpartition(".")
        prefix = name.removesuffix(part)
        if part == "mean_weight" and f"{prefix}var_weight" in state:
            temperature = float(state.get(f"{prefix}temperature", 1.0))
            found[stem] = _shares(state[name], temperature), _shares(state[f"{prefix}var_weight"], temperature)
    return found


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return what sorts ``layer2`` before ``layer10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _shares(logits: Array, temperature: float = 1.0) -> Array:
    """Return the softmax of logits, which at a temperature of 0 is 1 for the largest."""
    if not temperature:
        return np.asarray(np.eye(len(logits))[np.argmax(logits)])
    powers = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return np.asarray(powers / powers.sum())
