"""State dicts of PyTorch models: read without running code, and fitted with a list of what does not fit."""

import json
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ...errors import InputError, UnsupportedError, listed, note, spoken
from ...formats.fields import read
from ...formats.place import Place
from ...formats.text import json_object
from ..archives import is_archive
from ..files import damaged, is_text, require_file
from ..misfit import misfit
from ..tensors import header_of, is_safetensors
from .archive import require_as_written
from .wrappers import Rename, fitted, plain, state_in, without_count

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin")
"""What a file with weights may end in. Its content tells which kind it is."""
_ARCHIVE, _PICKLE = b"PK", b"\x80"
"""What a checkpoint of PyTorch begins with, of versions from 1.6 on and before."""
_VERSIONS = "versions"
"""Where a file says which version of its class each module's tensors are of, as a state dict's ``_metadata`` does."""

Versions = Mapping[str, Mapping[str, Any]]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors in safetensors or in a torch checkpoint of plain weights, by name; content tells which it is.

    What wrappers leave is taken off and told: dictionaries such as a checkpoint's ``state_dict`` and ``model``, in any
    nesting, ``module.`` before every name and ``_orig_mod.`` anywhere.

    Raises `InputError` for anything but plain weights; nothing in the file is ever executed. Raises
    `UnsupportedError` for TorchScript.
    """
    require_file(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"expected weights in a file ending in {', '.join(SUFFIXES)}, received {path}")
    return read_tensors(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file of any name; see `read_state_dict`."""
    with path.open("rb") as file:
        head = file.read(2)
    is_pickled = head.startswith((_ARCHIVE, _PICKLE))
    if is_safetensors(path) or (path.suffix == SUFFIXES[0] and not is_pickled):
        return _from_safetensors(path)
    if not is_pickled:
        raise InputError(
            f"expected weights in {path}, received a file of another kind, neither of PyTorch nor safetensors; get the "
            "file once more"
        )
    if head == _ARCHIVE:
        _require_checkpoint(path)
    return _from_checkpoint(path)


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    told = header_of(path).get("__metadata__")
    versions = _versions_in(told.get(_VERSIONS)) if isinstance(told, dict) else None
    try:
        if is_text(path):
            return _plain(safetensors.torch.load_file(path), versions, path)
        return _plain(safetensors.torch.load(path.read_bytes()), versions, path)
    except (SafetensorError, OSError) as error:
        raise damaged("weights", path, str(error).removeprefix("Error while deserializing header: ")) from None


def _require_checkpoint(path: Path) -> None:
    """Raise `InputError` for an archive that is cut off or changed, or of something else than weights."""
    if not is_archive(path):
        raise damaged("weights", path, "its end is cut off")
    require_as_written(path, "weights")
    with ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
    if "models/model.json" in names:
        raise InputError(
            f"expected weights in {path}, received a program of torch.export, which is a MODEL by itself and ends in "
            ".pt2"
        )
    if "data.pkl" not in names:
        raise InputError(
            f"expected weights in {path}, received an archive of something else; save model.state_dict() by torch.save"
        )


def _from_checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other pickles than PyTorch's
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        told = re.search(r"GLOBAL (\S+)", str(error))
        raise InputError(
            f"expected plain weights in {path}, received a pickle that holds more and could run code"
            f"{f' ({told[1]})' if told else ''}; nothing was run. Save model.state_dict() instead, by torch.save"
        ) from None
    except Exception as error:
        if "TorchScript" in str(error):
            raise UnsupportedError(
                f"expected weights in {path}, received a TorchScript archive; save the original module's state_dict()"
            ) from None
        raise damaged("weights", path, _first_line(error)) from None
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

    Raises as `require_values`.
    """
    require_values(model)
    state = model.state_dict()
    told = {name: known["version"] for name, known in getattr(state, "_metadata", {}).items() if "version" in known}
    values = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    try:
        safetensors.torch.save_file(values, path, metadata={_VERSIONS: json.dumps(told)})
    except SafetensorError as error:  # of the system, in words of the library's own
        raise OSError(f"expected to write {path.name}, received {error}") from None


def require_values(model: nn.Module) -> None:
    """Raise `UnsupportedError` for weights that come with the first input, `InputError` for those on the meta device.

    Both list them.
    """
    tensors = [item for each in (model.named_parameters(), model.named_buffers()) for item in each]
    if lazy := [name for name, tensor in tensors if nn.parameter.is_lazy(tensor)]:
        example = spoken("give --input-shape, the shape of one", "run the model once on an example")
        raise UnsupportedError(
            f"expected a model whose weights are there, received {len(lazy)} of lazy layers, which wait for the first "
            f"input: {example}:\n{listed(lazy)}"
        )
    if empty := [name for name, tensor in tensors if tensor.is_meta]:
        raise InputError(
            f"expected a model whose weights have values, received {len(empty)} on the meta device, which have none; "
            f"build it on another device, and load weights:\n{listed(empty)}"
        )


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
