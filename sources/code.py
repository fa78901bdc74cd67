"""A model that Python code builds: a callable in a file or in a module."""

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeVar

from ..errors import InputError, MissingDependencyError, NormswapError, TerminatedError, missing
from .files import require_file

T = TypeVar("T")


def builder(location: str, name: str, forms: str) -> Callable[[], Any]:
    """Return the callable ``name`` in a Python file or module, which is run for that.

    A file and what it imports, then or when it is called, see the modules beside it first, as when Python runs it.

    Raises `InputError` if there is none or the code fails, also when it is called, and `MissingDependencyError` if it
    imports what is not installed; ``forms`` says what else a model could have been.
    """
    folder = None
    if location.endswith(".py"):
        path = Path(location)
        require_file(path)
        module, folder = _run(path), path.resolve().parent
    else:
        module = _imported(location, f"{location}:{name}", forms)
    found = getattr(module, name, None)
    if not callable(found):
        raise InputError(f"expected a callable {name} in {location}, received {found!r}")

    def build() -> Any:
        with nullcontext() if folder is None else _modules_of(folder):
            return _ran(found, location, f"expected a model from {name} in {location}, received")

    return build


def _imported(location: str, spec: str, forms: str) -> ModuleType:
    def find() -> ModuleType:
        try:
            return importlib.import_module(location)
        except ModuleNotFoundError as error:
            if error.name is None or f"{location}.".startswith(f"{error.name}."):
                raise InputError(
                    f"expected a module to import or one of {forms}, received model={spec} ({error})"
                ) from None
            raise

    return _ran(find, location, f"expected Python code in {location}, received code that fails:")


def _ran(code: Callable[[], T], location: str, expected: str) -> T:
    """Return what the user's code in ``location`` gives; however it fails is told as theirs.

    Ctrl-C and what ends the process from outside are not the code's.

    Raises `InputError` that begins with ``expected``, `MissingDependencyError` for an import of what is not installed,
    and what of ours the code lets through.
    """
    try:
        return code()
    except (KeyboardInterrupt, TerminatedError, NormswapError):
        raise
    except ModuleNotFoundError as error:
        raise MissingDependencyError(missing(str(error.name), location)) from error
    except BaseException as error:  # such as SystemExit, which would end us without a result
        said = next(iter(str(error).splitlines()), "")
        raise InputError(f"{expected} {type(error).__name__}{said and f': {said}'}") from error


def _run(path: Path) -> ModuleType:
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    with _modules_of(path.resolve().parent):
        first = sys.modules.setdefault(path.stem, module)
        run = partial(module_spec.loader.exec_module, module)
        _ran(run, str(path), f"expected Python code in {path}, received code that fails:")
    _rename(module, first.__name__)  # what it is called by now, if the file was run before
    return module


_second: dict[Path, dict[str, ModuleType]] = {}
"""The modules of each folder whose names others had first, by those names."""


@contextmanager
def _modules_of(folder: Path) -> Iterator[None]:
    """Have ``import`` find a folder's own modules first, and not those of another folder that have their names.

    The others have their names again afterwards. The folder's go on under names of their own, by which what is made of
    their classes is pickled.
    """
    own = {module.name for module in pkgutil.iter_modules([str(folder)])}
    taken = {name for name in own & sys.modules.keys() if is_elsewhere(name, folder)}
    others = _without(taken)
    sys.modules.update({name: module for name, module in _second.get(folder, {}).items() if _top(name) in taken})
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if taken:
            second = _without(taken)
            sys.modules.update(others)
            _second[folder] = second
            for name, module in second.items():
                _rename(module, f"{_top(name)}_{_mark(folder)}{name.removeprefix(_top(name))}")
                sys.modules[module.__name__] = module


def is_elsewhere(name: str, folder: Path) -> bool:
    """Return whether an imported module is of another folder, and neither of a library nor the program that runs."""
    module = sys.modules[name]
    place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    if place is None or _top(name) in {*sys.stdlib_module_names, "__main__", _top(__name__)}:
        return False
    path = Path(place).resolve()
    return not path.is_relative_to(folder) and not {"site-packages", "dist-packages"} & {*path.parts}


def _without(names: set[str]) -> dict[str, ModuleType]:
    """Return the modules of these names and all in them, which are taken out of those that are imported."""
    return {name: sys.modules.pop(name) for name in [*sys.modules] if _top(name) in names}


def _top(name: str) -> str:
    return name.partition(".")[0]


def _mark(folder: Path) -> str:
    return hashlib.sha256(str(folder).encode()).hexdigest()[:8]


def _rename(module: ModuleType, name: str) -> None:
    """Give a module another name, and its classes and functions, which are pickled by that."""
    before = module.__name__
    module.__name__ = name
    if module.__spec__ is not None:
        module.__spec__.name = name
        module.__package__ = module.__spec__.parent
    left = list(vars(module).values())
    while left:
        found = left.pop()
        if isinstance(found, type | FunctionType) and found.__module__ == before:
            found.__module__ = name
            left += vars(found).values() if isinstance(found, type) else ()
