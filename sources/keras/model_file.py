"""Files that hold a whole Keras model."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from ...errors import InputError, MissingDependencyError, UnsupportedError, missing
from ..code import is_elsewhere
from ..files import require_file
from .hdf5 import HDF5_SUFFIXES, require_hdf5, require_readable

SUFFIXES = (".keras", *HDF5_SUFFIXES)


_KNOWN = re.compile(r"Full object config: \{'module': '(\w+)")
"""Of what a class is, as the configuration around it says: none of Python's own is a layer."""
_ONE_OF_MANY = re.compile(r"Example error message for object <\w+ name=([^,>]+).*?>:\s+(.+)")


class RefusedByKerasError(InputError):
    """Keras does not make a model of a file that is whole: code may be needed that it does not know or trust."""


class UnknownClassError(RefusedByKerasError):
    """A file has a layer of a class that nothing has told Keras of."""

    exit_code = UnsupportedError.exit_code


def read_model(path: Path) -> Any:
    """Return the model in a Keras file, read in safe mode.

    Raises `RefusedByKerasError` if Keras refuses it, and `InputError` if it cannot be read at all.
    """
    require_file(path)
    require_h5py(path)
    require_hdf5(path, "a Keras model")
    require_readable(path)
    keras = import_keras()
    from ...layers import keras as _ours  # noqa: F401 - for Keras to know them, where the file holds some

    try:
        return keras.models.load_model(path, compile=False)
    except Exception as error:
        said = _code_in(path) if "Lambda" in str(error) else reason(error)
        message = (
            f"expected a Keras model in {path}, received a file Keras refuses: {said.rstrip('.')}{_way_out(path, said)}"
        )
        known = _KNOWN.search(str(error))
        unknown = "Could not locate" in said and not (known and known[1] in sys.stdlib_module_names)
        raise (UnknownClassError if unknown else RefusedByKerasError)(message) from error


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


def _code_in(path: Path) -> str:
    """Return what is said of a file whose Lambda layers, which are code, Keras does not read: their names."""
    import h5py

    if path.suffix == ".keras":
        with ZipFile(path) as archive:
            config = archive.read("config.json").decode()
    else:
        with h5py.File(path, "r") as file:
            config = str(file.attrs["model_config"])
    named: list[str] = []

    def see(found: dict[str, Any]) -> dict[str, Any]:
        if found.get("class_name") == "Lambda" and isinstance(found.get("config"), dict):
            named.append(str(found["config"].get("name")))
        return found

    json.loads(config, object_hook=see)
    return f"code in the Lambda layer{'' if len(named) == 1 else 's'} {', '.join(named)}"


def _way_out(path: Path, said: str) -> str:
    """Return what to do about code of the user's that a file needs, and that is not imported or not trusted."""
    code = f"give file.py:callable in its place, a function that returns keras.models.load_model({path.name!r}"
    if "safe_mode" in said or "Lambda" in said:
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
    if one := _ONE_OF_MANY.search(str(error)):  # Keras tells of one, below a line that says how many there are
        return f"layer {one[1]}: {one[2]}"
    where, _, cause = str(error).strip().rpartition("Exception encountered: ")
    name = re.search(r"""'name': '([^']*)'""", where[where.rfind("config=") :]) if where else None
    cause = cause.partition(" Full object config: ")[0]  # pages of it
    lines = cause.strip().splitlines() or [type(error).__name__]
    return f"layer {name[1]}: {lines[0]}" if name else lines[0]
