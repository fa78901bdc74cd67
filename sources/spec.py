"""What people call a model: a name in a zoo, a callable in Python code, or a file."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from ..errors import InputError, UnsupportedError, option
from .code import builder
from .files import as_here, as_utf8, is_name
from .keras.model_file import SUFFIXES as KERAS_SUFFIXES
from .keras.model_file import names_of_a_fresh_process, read_model
from .zoo import ZOOS, load_from_zoo

PROGRAM_SUFFIX = ".pt2"
WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin")
FORMS = (
    "timm:NAME, torchvision:NAME, keras:NAME, file.py:callable, package.module:callable, FILE.keras, FILE.h5 or "
    "FILE.pt2"
)

_MODELS = f"{__name__.partition('.')[0]}.models"
"""Where this library has networks of its own."""

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""A name that a zoo has an architecture by, without a way to a file or a hub."""

_returned: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""What callables have returned, which may be patched by now."""


def load_source(spec: str | os.PathLike[str], *, pretrained: bool = True, trust: bool = False) -> Any:
    """Return what ``spec`` names: a module, a Keras model, or for a ``.pt2`` file a `torch.export.ExportedProgram`.

    ``pretrained=False`` builds a zoo's architecture without fetching its weights. A callable is Python code and
    is run; it has to build a model each time. A ``.pt2`` file can run code while it is read, and is read with ``trust``
    only.

    Raises `InputError` if there is no such model or it is not trusted, `UnsupportedError` for a callable that returns
    the same model again, `MissingDependencyError` if the zoo's package is not installed.
    """
    if not isinstance(spec, str | os.PathLike):
        raise InputError(f"expected a model as {FORMS}, received model={spec!r}")
    spec = os.fspath(spec)
    kind, _, name = spec.partition(":")
    if kind in ZOOS and name:
        with names_of_a_fresh_process():
            return load_from_zoo(kind, name, pretrained=pretrained)
    if spec.endswith(KERAS_SUFFIXES):
        return read_model(Path(spec))
    if spec.endswith(PROGRAM_SUFFIX):
        from .torch.program import read_program

        return read_program(Path(spec), trust=trust)
    if kind and name:
        with names_of_a_fresh_process():
            return _new(builder(kind, name, FORMS)(), spec)
    raise InputError(problem_of(spec))


def problem_of(spec: str) -> str:
    """Return why ``spec`` is no name that `load_source` knows, "" for one of its `FORMS`."""
    kind, _, name = spec.partition(":")
    if (kind and name) or spec.endswith((PROGRAM_SUFFIX, *KERAS_SUFFIXES)):
        return ""
    expected = f"expected a model as {FORMS}, received"
    if (Path(spec) / "saved_model.pb").is_file():
        return (
            f"{expected} the SavedModel {spec}, a graph that has no layers any more; save the model that it was "
            "exported from as .keras"
        )
    if Path(spec).is_file():
        way = f"give what builds the network, and {option('weights', spec)}"
        held = f"what may be weights: {way}" if spec.endswith(WEIGHTS_SUFFIXES) else "a file of another kind"
        return f"{expected} model={spec}, {held}"
    return f"{expected} model={spec}"


def _new(model: Any, spec: str) -> Any:
    """Return what a callable has returned; raises `UnsupportedError` if that is what it returned before."""
    if not hasattr(model, "__weakref__"):
        return model  # no model
    if _returned.get(id(model)) is model:
        raise UnsupportedError(
            f"expected a source that builds a model each time it is called, received {spec}, which returns the same "
            "one again; have it build the model, or return a copy of it"
        )
    _returned[id(model)] = model
    return model


def runs_code(spec: str) -> bool:
    """Return whether `load_source` could run code for ``spec`` that is not of this library, a zoo or Keras.

    A zoo's plain name builds an architecture that the zoo itself has; other names have it fetch a model of somebody's.
    A Keras file is read in safe mode. A ``.pt2`` file is not judged here: it takes a word of its own to be read at all.
    """
    kind, _, name = spec.partition(":")
    if kind in ZOOS and name:
        return _PLAIN.fullmatch(name) is None
    if spec.endswith((PROGRAM_SUFFIX, *KERAS_SUFFIXES)):
        return False
    return bool(kind and name) and name not in _networks(kind)


def _networks(module: str) -> Sequence[str]:
    """Return the names of the networks in a module of this library's."""
    if module == f"{_MODELS}.torch":
        from ..models import torch

        return torch.__all__
    if module == f"{_MODELS}.keras":
        from ..models import keras

        return keras.__all__
    return ()


def relative_spec(spec: str, directory: Path) -> str:
    """Return ``spec`` with a file's path made relative to ``directory``, in UTF-8, so that both can move together.

    Raises `InputError` for no path.
    """
    _require_name(spec)
    file, colon, name = spec.rpartition(":")
    path = Path(file if file.endswith(".py") else spec)
    if path.suffix not in (".py", PROGRAM_SUFFIX, *KERAS_SUFFIXES):
        return spec
    relative = as_utf8(Path(os.path.relpath(path.resolve(), directory.resolve())).as_posix())
    return f"{relative}{colon}{name}" if path.suffix == ".py" else relative


def absolute_spec(spec: str, directory: Path) -> str:
    """Return what `relative_spec` did, with a file's path resolved against ``directory``.

    Raises `InputError` for no path.
    """
    try:
        here = as_here(spec)
    except ValueError:
        here = spec
    _require_name(here)
    file, colon, name = here.rpartition(":")
    if file.endswith(".py"):
        return f"{_within(directory, file)}{colon}{name}"
    return str(_within(directory, here)) if here.endswith((PROGRAM_SUFFIX, *KERAS_SUFFIXES)) else here


def _require_name(spec: str) -> None:
    if not is_name(spec):
        raise InputError(f"expected a model as {FORMS}, received model={spec!r}")


def _within(directory: Path, file: str) -> Path:
    """Return a file's path, by its own name even if that is a link, as all names in a hub's cache are."""
    path = directory / file
    return path.parent.resolve() / path.name
