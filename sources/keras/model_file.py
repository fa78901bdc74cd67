"""Files that hold a whole Keras model."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import InputError, MissingDependencyError, missing
from ..archives import require_whole
from ..code import is_elsewhere
from ..files import require_file
from .hdf5 import require_readable

SUFFIXES = (".keras", ".h5", ".hdf5")


class RefusedByKerasError(InputError):
    """Keras does not make a model of a file that is whole: code may be needed that it does not know or trust."""


def read_model(path: Path) -> Any:
    """Return the model in a Keras file, read in safe mode.

    Raises `RefusedByKerasError` if Keras refuses it, and `InputError` if it cannot be read at all.
    """
    require_file(path)
    if path.suffix == ".keras":
        require_whole(path, "a Keras model")
    keras = import_keras()
    require_h5py(path)
    require_readable(path)
    from ...layers import keras as _ours  # noqa: F401 - for Keras to know them, where the file holds some

    try:
        return keras.models.load_model(path, compile=False)
    except Exception as error:
        said = reason(error)
        message = (
            f"expected a Keras model in {path}, received a file Keras refuses: {said.rstrip('.')}{_way_out(path, said)}"
        )
        raise RefusedByKerasError(message) from error


def require_h5py(path: Path) -> None:
    """Raise `MissingDependencyError` without h5py, whose absence Keras would tell as a damaged file."""
    try:
        import h5py  # noqa: F401
    except ModuleNotFoundError:
        raise MissingDependencyError(missing("h5py", str(path))) from None


@contextmanager
def registered_by(source: str | None) -> Iterator[None]:
    """Keep from Keras what code in other folders than a source's has registered, maybe by names that its code uses."""
    file = (source or "").rpartition(":")[0]
    objects, others = import_keras().saving.get_custom_objects(), {}
    if file.endswith(".py"):
        folder = Path(file).resolve().parent
        known = ((name, each, getattr(each, "__module__", None)) for name, each in objects.items())
        others = {name: each for name, each, home in known if home in sys.modules and is_elsewhere(home, folder)}
    for name in others:
        del objects[name]
    try:
        yield
    finally:
        objects.update(others)


def _way_out(path: Path, said: str) -> str:
    """Return what to do about code of the user's that a file needs, and that is not imported or not trusted."""
    code = f"give file.py:callable in its place, a function that returns keras.models.load_model({path.name!r}"
    if "safe_mode" in said or "enable_unsafe_deserialization" in said:
        return f"; {code}, safe_mode=False), if you trust the file"
    if "Could not locate" in said or "Unknown layer" in said:
        return f"; {code}) and the file imports or defines the class"
    return ""


def import_keras() -> Any:
    """Import Keras without what TensorFlow's libraries write to stderr as they are loaded, past Python's."""
    if "keras" in sys.modules:
        return sys.modules["keras"]
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
            import keras
    except (ImportError, RuntimeError) as error:
        message = f"a keras: model needs keras: pip install 'normswap[keras]' ({error})"
        raise MissingDependencyError(message) from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    return keras


@contextmanager
def names_of_a_fresh_process() -> Iterator[None]:
    """Let Keras number the layer names it makes up from the start, so that a model has the same names each time."""
    state = sys.modules.get("keras.src.backend.common.global_state")
    if state is None:
        yield
        return
    numbers = state.get_global_attribute("object_name_uids")
    state.set_global_attribute("object_name_uids", None)
    try:
        yield
    finally:
        state.set_global_attribute("object_name_uids", numbers)


def reason(error: Exception) -> str:
    """Return what Keras says is wrong, and in which layer, without the configurations it quotes around that."""
    where, _, cause = str(error).strip().rpartition("Exception encountered: ")
    name = re.search(r"""'name': '([^']*)'""", where[where.rfind("config=") :]) if where else None
    cause = cause.partition(" Full object config: ")[0]  # pages of it
    lines = cause.strip().splitlines() or [type(error).__name__]
    return f"layer {name[1]}: {lines[0]}" if name else lines[0]
