"""A model that Python code builds: a callable in a file or in a module."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError
from .files import require_file


def builder(location: str, name: str, forms: str) -> Callable[[], Any]:
    """Return the callable ``name`` in a Python file or module, which is run for that.

    Raises `InputError` if there is none or the code fails; ``forms`` says what else a model could have been.
    """
    if location.endswith(".py"):
        path = Path(location)
        require_file(path)
        # The file's own folder comes first while it is imported, as when Python runs it.
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.path.insert(0, str(path.resolve().parent))
        sys.modules.setdefault(path.stem, module)
        try:
            module_spec.loader.exec_module(module)
        except Exception as error:
            raise InputError(f"expected Python code in {path}, received code that fails: {error!r}") from error
        finally:
            sys.path.remove(str(path.resolve().parent))
    else:
        try:
            module = importlib.import_module(location)
        except ModuleNotFoundError as error:
            raise InputError(
                f"expected a module to import or one of {forms}, received model={location}:{name} ({error})"
            ) from None
    found = getattr(module, name, None)
    if not callable(found):
        raise InputError(f"expected a callable {name} in {location}, received {found!r}")
    return found  # type: ignore[no-any-return]
