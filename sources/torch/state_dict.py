"""State dicts of PyTorch models: read without running code, and fitted with a list of what does not fit."""

import json
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import InputError, UnsupportedError
from ..files import require_file
from ..misfit import misfit

PICKLE_SUFFIXES = (".pt", ".pth", ".th", ".bin")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_VERSIONS = "versions"
"""Where a file says which version of its class each module's tensors are of, as a state dict's ``_metadata`` does."""

Versions = Mapping[str, Mapping[str, Any]]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a ``.safetensors`` file or in a torch checkpoint of plain weights, by name.

    A checkpoint's ``state_dict`` entry and the prefixes ``module.`` and ``_orig_mod.`` that wrappers leave are
    taken off.

    Raises `InputError` for anything but plain weights; nothing in the file is ever executed. Raises
    `UnsupportedError` for TorchScript.
    """
    require_file(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                told = (file.metadata() or {}).get(_VERSIONS)
            return _versioned(safetensors.torch.load_file(path), None if told is None else _versions_in(told))
        except (SafetensorError, OSError) as error:
            raise InputError(f"expected weights in {path}, received a damaged file: {error}") from None
    if path.suffix not in PICKLE_SUFFIXES:
        known = ", ".join((".safetensors", *PICKLE_SUFFIXES))
        raise InputError(f"expected weights in a file ending in {known}, received {path}")
    return read_checkpoint(path)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a torch checkpoint of any file name; see `read_state_dict`."""
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
    return _unwrap(content, path)


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load ``state`` into ``model``; raises `InputError` that lists what is missing, unexpected or of another shape.

    Where ``state`` does not tell the versions of the modules' classes, they are those of ``model``. A missing
    ``num_batches_tracked`` or ``temperature`` is no misfit: old and others' checkpoints lack them.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state and not k.endswith(("num_batches_tracked", "temperature"))]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k}: {tuple(own[k].shape)} in the model, {tuple(state[k].shape)} in the file"
        for k in own
        if k in state and own[k].shape != state[k].shape
    ]
    if missing or unexpected or shapes:
        raise misfit(origin, missing, unexpected, shapes, patched=_of_a_patched_model(missing, unexpected))
    versions = getattr(state, "_metadata", None)
    model.load_state_dict(
        _versioned(state, getattr(own, "_metadata", {}) if versions is None else versions), strict=False
    )


def write_state_dict(model: nn.Module, path: Path) -> None:
    """Write the model's state to a ``.safetensors`` file; tensors that share memory are written each for itself."""
    state = model.state_dict()
    told = {name: known["version"] for name, known in getattr(state, "_metadata", {}).items() if "version" in known}
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(tensors, path, metadata={_VERSIONS: json.dumps(told)})


def _versioned(state: Mapping[str, Tensor], versions: Versions | None) -> dict[str, Tensor]:
    """Return a state dict that tells the versions of the modules' classes, which some need to be loaded."""
    result: Any = OrderedDict(state)
    if versions is not None:
        result._metadata = OrderedDict(versions)
    return result  # type: ignore[no-any-return]


def _versions_in(text: str) -> Versions | None:
    """Return the versions that a file tells; None for what is none of ours."""
    try:
        told = json.loads(text)
    except ValueError:
        return None
    return {name: {"version": version} for name, version in told.items()} if isinstance(told, dict) else None


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()) or not content:
        kind = type(content).__name__
        raise InputError(f"expected a state dict of tensors in {path}, received a {kind} with other content")
    state = {str(name): tensor for name, tensor in content.items()}
    versions = getattr(content, "_metadata", None)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            if versions is not None:
                versions = {
                    f"{name}.".removeprefix(prefix).removesuffix("."): known for name, known in versions.items()
                }
    return _versioned(state, versions)


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
