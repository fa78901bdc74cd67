"""The gates of Switchable Normalizations in a file of weights or a bundle, for which no network has to be built."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np

from ..bundles.contents import KerasLayer, by_number, keras_layers, weights_of
from ..errors import InputError
from ..sources.keras.hdf5 import require_readable
from ..sources.tensors import is_safetensors
from .arrays import Array
from .checkpoint import Checkpoint, read_checkpoint
from .keras_h5 import KerasWeights, plain_array, require_no_link
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


def gates_in_bundle(directory: Path) -> Gates:
    """Return the gates in a bundle, those that the patch made first; of its files JSON and tensors alone are read.

    Raises `InputError` if it is no bundle or is damaged.
    """
    path, recipe = weights_of(directory)
    found = _of_state(read_checkpoint(path)) if recipe.framework == "torch" else _of_archive(path)
    patched = [choice.name for choice in recipe.choices if choice.name in found]
    return {name: found[name] for name in dict.fromkeys([*patched, *found])}


def _of_archive(path: Path) -> Gates:
    """Return the gates in a ``.keras`` file, whose configuration says which of its variables they are."""
    import h5py

    require_readable(path)
    layers: dict[str, list[KerasLayer]] = {}
    for layer in keras_layers(path):
        if layer.kind == "SwitchNormalization":
            layers.setdefault(layer.name, []).append(layer)
    found: Gates = {}

    def look(_: str, member: Any) -> None:
        name = member.attrs.get("name") if isinstance(member, h5py.Group) else None
        if isinstance(name, str) and layers.get(name) and "0" in member:
            layer = layers[name].pop(0)
            first = bool(layer.config.get("scale", True)) + bool(layer.config.get("center", True))
            mean, var = (plain_array(member[str(first + index)]) for index in range(2))
            found[layer.path] = _shares(mean, temperature := _temperature(member)), _shares(var, temperature)

    try:
        with ZipFile(path) as archive, archive.open("model.weights.h5") as stored, h5py.File(stored, "r") as file:
            require_no_link(file)
            file.visititems(look)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (BadZipFile, OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"expected a Keras model in {path}, received a damaged file: {error}") from None
    return found


def _temperature(group: Any) -> Array:
    """Return the last of a layer's variables."""
    return plain_array(group[str(len(group) - 1)])


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
    names = sorted(state, key=by_number) if is_safetensors(checkpoint.path) else state  # which sorts by letters
    for name in names:
        stem, _, part = name.rpartition(".")
        prefix = name.removesuffix(part)
        if part == "mean_weight" and f"{prefix}var_weight" in state:
            temperature = state.get(f"{prefix}temperature", 1.0)
            found[stem] = _shares(state[name], temperature), _shares(state[f"{prefix}var_weight"], temperature)
    return found


def _shares(logits: Array, temperature: Array | float = 1.0) -> Array:
    """Return the softmax of logits, which at a temperature of 0 is 1 for the largest.

    Raises `InputError` for an array that is none of gates.
    """
    if np.shape(logits) not in ((2,), (3,)):
        raise InputError(f"expected the logits of 2 or 3 gates, received an array of shape={np.shape(logits)}")
    if np.size(temperature) != 1:
        raise InputError(f"expected one temperature of gates, received an array of shape={np.shape(temperature)}")
    temperature = float(np.reshape(temperature, ()))
    if not temperature:
        return np.asarray(np.eye(len(logits))[np.argmax(logits)])
    powers = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return np.asarray(powers / powers.sum())
