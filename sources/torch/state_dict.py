"""State dicts of PyTorch models: read without running code, and fitted with a list of what does not fit."""

import json
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ...errors import InputError, UnsupportedError, listed, note
from ...formats.fields import read
from ...formats.place import Place
from ...formats.text import json_object
from ..archives import is_archive, require_whole
from ..files import is_text, require_file
from ..misfit import misfit
from ..tensors import header_of
from .wrappers import Rename, fitted, plain, state_in, without_count

PICKLE_SUFFIXES = (".pt", ".pth", ".th", ".bin")
_VERSIONS = "versions"
"""Where a file says which version of its class each module's tensors are of, as a state dict's ``_metadata`` does."""

Versions = Mapping[str, Mapping[str, Any]]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a ``.safetensors`` file or in a torch checkpoint of plain weights, by name.

    What wrappers leave is taken off and told: dictionaries such as a checkpoint's ``state_dict`` and ``model``, in any
    nesting, ``module.`` before every name and ``_orig_mod.`` anywhere.

    Raises `InputError` for anything but plain weights; nothing in the file is ever executed. Raises
    `UnsupportedError` for TorchScript.
    """
    require_file(path)
    if path.suffix == ".safetensors":
        told = header_of(path).get("__metadata__")
        versions = _versions_in(told.get(_VERSIONS)) if isinstance(told, dict) else None
        try:
            if is_text(path):
                return _plain(safetensors.torch.load_file(path), versions, path)
            return _plain(safetensors.torch.load(path.read_bytes()), versions, path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"expected weights in {path}, received a damaged file: {error}") from None
    if path.suffix not in PICKLE_SUFFIXES:
        known = ", ".join((".safetensors", *PICKLE_SUFFIXES))
        raise InputError(f"expected weights in a file ending in {known}, received {path}")
    return read_checkpoint(path)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a torch checkpoint of any file name; see `read_state_dict`."""
    if is_archive(path):
        require_whole(path, "weights")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"expected plain weights in {path}, received a pickle that holds more and could run code; nothing was "
            f"run. Save model.state_dict() instead ({_first_line(error)})"
        ) from None
    except Exception as error:
        if "TorchScript" in str(error):
            raise UnsupportedError(
                f"expected weights in {path}, received a TorchScript archive; save the original module's state_dict()"
            ) from None
        raise InputError(f"expected weights in {path}, received a damaged file: {_first_line(error)}") from None
    state = state_in(content, path)
    return _plain(without_count(state), getattr(state, "_metadata", None), path)


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load ``state`` into ``model``.

    Raises `InputError` that lists what is missing, unexpected, or of another shape or kind of numbers.
    Where none of the names is the model's, what wrappers put before all of them is taken off, as ``model.``, and told.
    Where ``state`` does not tell the versions of the modules' classes, they are those of ``model``. A missing
    ``num_batches_tracked`` or ``temperature`` is no misfit: old and others' checkpoints lack them.
    """
    own = model.state_dict()
    rename, removed = fitted(state, own)
    state = _renamed(state, getattr(state, "_metadata", None), rename, removed, origin)
    missing = [k for k in own if k not in state and not k.endswith(("num_batches_tracked", "temperature"))]
    unexpected = [k for k in state if k not in own]
    common = [(k, own[k], state[k]) for k in own if k in state]
    shapes = [
        f"{k}: {tuple(ours.shape)} in the model, {tuple(theirs.shape)} in the file"
        for k, ours, theirs in common
        if ours.shape != theirs.shape
    ]
    types = [
        f"{k}: {_dtype(ours)} in the model, {_dtype(theirs)} in the file"
        for k, ours, theirs in common
        if _kind(ours) != _kind(theirs) and not k.endswith("num_batches_tracked")  # averages of weights average it
    ]
    if missing or unexpected or shapes or types:
        raise misfit(origin, missing, unexpected, shapes, types, patched=_of_a_patched_model(missing, unexpected))
    versions = getattr(state, "_metadata", None)
    model.load_state_dict(
        _versioned(state, getattr(own, "_metadata", {}) if versions is None else versions), strict=False
    )


def _kind(tensor: Tensor) -> str:
    """Return of which kind a tensor's values are; within one, values are converted."""
    if tensor.is_floating_point():
        return "float"
    return "complex" if tensor.is_complex() else "bool" if tensor.dtype is torch.bool else "integer"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def write_state_dict(model: nn.Module, path: Path) -> None:
    """Write the model's state to a ``.safetensors`` file; tensors that share memory are written each for itself.

    Raises `UnsupportedError`, which lists them, for tensors that have no values yet.
    """
    tensors = (item for each in (model.named_parameters(), model.named_buffers()) for item in each)
    empty = [name for name, tensor in tensors if nn.parameter.is_lazy(tensor) or tensor.is_meta]
    if empty:
        raise UnsupportedError(
            f"expected a model whose weights have values, received {len(empty)} without, of lazy layers or on the "
            f"meta device; run the model once on an example, or load weights on a device:\n{listed(empty)}"
        )
    state = model.state_dict()
    told = {name: known["version"] for name, known in getattr(state, "_metadata", {}).items() if "version" in known}
    values = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(values, path, metadata={_VERSIONS: json.dumps(told)})


def _versioned(state: Mapping[str, Tensor], versions: Versions | None) -> dict[str, Tensor]:
    """Return a state dict that tells the versions of the modules' classes, which some need to be loaded."""
    result: Any = OrderedDict(state)
    if versions is not None:
        result._metadata = OrderedDict(versions)
    return result  # type: ignore[no-any-return]


def _versions_in(text: Any) -> Versions | None:
    """Return the versions that a file tells; None for what is none of ours."""
    try:
        told = read(dict[str, int], json_object(text, Place()), Place()) if isinstance(text, str) else None
    except InputError:
        return None
    return None if told is None else {name: {"version": version} for name, version in told.items()}


def _plain(state: Mapping[str, Tensor], versions: Versions | None, path: Path) -> dict[str, Tensor]:
    """Return a state dict under the names that it has without wrappers, and tell what was taken off."""
    rename, removed = plain(map(str, state))
    return _renamed({str(name): tensor for name, tensor in state.items()}, versions, rename, removed, str(path))


def _renamed(
    state: Mapping[str, Tensor], versions: Versions | None, rename: Rename, removed: Sequence[str], origin: str
) -> dict[str, Tensor]:
    if removed:
        note(f"{'.'.join(removed)}. taken off the names of the weights in {origin}")
    if versions is not None:
        versions = {rename(f"{name}.").removesuffix("."): known for name, known in versions.items()}
    return _versioned({rename(name): tensor for name, tensor in state.items()}, versions)


def _of_a_patched_model(missing: list[str], unexpected: list[str]) -> bool:
    """Return whether the misfit is that of a patched model's weights: SN's gates, BRN's limits, GN's lack of either.

    Biases that nothing here has are those that layers in front of norms get.
    """
    if any(name.endswith(("mean_weight", "r_max")) for name in unexpected):
        return True
    added = all(name.endswith(".bias") for name in unexpected)
    return bool(missing) and added and all(n.endswith(("running_mean", "running_var")) for n in missing)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
