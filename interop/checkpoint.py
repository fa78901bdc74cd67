"""What a weights file holds, told by its content: another system's weights of a network without BatchNorm, or others.

Nothing in a file is ever executed.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import ZipFile

from ..errors import InputError
from ..sources.files import require_file
from ..sources.keras.other_norms import holds_other_norms
from ..sources.tensors import is_safetensors
from .keras_h5 import KerasWeights, read_keras_h5
from .switchablenorms import is_switchablenorms

SYSTEMS = {
    "sn": "keras-switchnorm",
    "brn": "BatchRenormalization",
    "gn": "GroupNormalization-keras",
}
"""The systems whose Keras layers `read_keras_h5` knows, by their kind."""

_HDF5 = b"\x89HDF\r\n\x1a\n"
_KERAS_ARCHIVE = "model.weights.h5"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The weights in a file, by the system that wrote them.

    ``system`` is "switchablenorms", one of `SYSTEMS`, or "normswap" for a model's own state dict or Keras weights.
    ``kind`` is what the norms of another system are ("sn", "brn" or "gn"), None where nothing tells. ``state`` holds
    a state dict's tensors, ``layers`` the layers of another system's Keras file.
    """

    path: Path
    framework: Literal["torch", "keras"]
    system: str
    kind: str | None = None
    state: Mapping[str, Any] | None = None
    layers: KerasWeights | None = None


def read_checkpoint(path: Path) -> Checkpoint:
    """Return what is in ``path``, whatever the file is called.

    Raises `InputError` for a file that is neither a PyTorch checkpoint of plain weights nor one of Keras, is damaged,
    or holds another system's layers in part.
    """
    require_file(path, "weights")
    written = _format(path)
    if written is None:
        raise InputError(f"expected weights of PyTorch or Keras in {path}, received another file")
    if written == "hdf5" and holds_other_norms(path):
        layers = read_keras_h5(path)
        kinds = list(dict.fromkeys(layer.kind for layer in layers.values() if layer.kind != "other"))
        if len(kinds) > 1:
            systems = ", ".join(SYSTEMS[kind] for kind in kinds)
            raise InputError(f"expected layers of one system in {path}, received {systems}; load each by itself")
        if kinds:
            return Checkpoint(path, "keras", SYSTEMS[kinds[0]], kinds[0], layers=layers)
    if written in ("hdf5", "keras"):
        return Checkpoint(path, "keras", "normswap")
    from ..sources.torch.state_dict import read_tensors

    state = read_tensors(path)
    if is_switchablenorms(state):
        return Checkpoint(path, "torch", "switchablenorms", "sn", state)
    return Checkpoint(path, "torch", "normswap", _own_kind(state), state)


def is_patched_checkpoint(path: Path) -> bool:
    """Return whether ``path`` holds another system's weights of a network with its norms in the place of BatchNorms.

    Raises as `read_checkpoint` does.
    """
    return path.is_file() and _format(path) is not None and read_checkpoint(path).system != "normswap"


def _own_kind(state: Mapping[str, Any]) -> str | None:
    """Return what the norms of a patched model's own state dict are, None where it may have GroupNorms or none."""
    for part, kind in (("mean_weight", "sn"), ("r_max", "brn")):
        if any(name.rpartition(".")[2] == part for name in state):
            return kind
    return None


def _format(path: Path) -> str | None:
    """Return "hdf5", "keras" (an archive of Keras 3) or "torch" by a file's first bytes, None for any other."""
    with path.open("rb") as file:
        head = file.read(8)
    if head == _HDF5:
        return "hdf5"
    if head.startswith(b"PK"):
        with suppress(Exception), ZipFile(path) as archive:  # of a damaged one: zipfile has errors of many classes
            return "keras" if _KERAS_ARCHIVE in archive.namelist() else "torch"
    is_torch = head.startswith((b"PK", b"\x80")) or path.suffix == ".safetensors" or is_safetensors(path)
    return "torch" if is_torch else None
