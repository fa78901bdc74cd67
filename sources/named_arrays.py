"""Inputs of a model in an ``.npz`` file of named arrays, of which none is code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..frameworks.example import Inputs
from .archives import is_archive, require_honest
from .files import require_file


def read_inputs(path: Path) -> Inputs:
    """Return the arguments in an ``.npz``, each array in the place its name says.

    A name is an argument's, or ``arr_0``, ``arr_1``, ... for those by position, as `numpy.savez` calls them. A way into
    an argument follows after dots: ``images.0`` and ``images.1`` are two arrays of a list, ``batch.x`` one of a
    mapping. Texts and truth values without dimensions are Python's own.

    Raises `InputError` if it is no such file, or its names contradict each other.
    """
    require_file(path, "an .npz")
    if not is_archive(path):  # else NumPy takes it for a pickle, and says how to load one
        raise InputError(f"expected an .npz of named arrays in {path}, received a file of another kind")
    require_honest(path, "an .npz of named arrays")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: read_array(archive, name) for name in archive.files}
    except InputError as error:
        raise InputError(f"{error} in {path}; numbers, truth values and one text are read, None is left out") from None
    except Exception as error:  # zipfile's own errors have no class in common
        raise InputError(f"expected an .npz of named arrays in {path}, received a damaged one: {error}") from None
    if not arrays:
        raise InputError(f"expected an .npz of named arrays in {path}, received one without any")
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        _put(tree, name.split("."), _value(array), f"{name!r} in {path}")
    arguments = {key: _container(value) for key, value in tree.items()}
    positions = {int(key[4:]): key for key in arguments if key.startswith("arr_") and key[4:].isdecimal()}
    if sorted(positions) != list(range(len(positions))):
        raise InputError(f"expected arr_0, arr_1 and so on in {path}, received {', '.join(positions.values())}")
    by_position = [arguments.pop(positions[index]) for index in sorted(positions)]
    return Inputs(*by_position, **arguments)


def read_array(archive: Any, name: str) -> Any:
    """Return an array of numbers; raises `InputError` for one of Python's objects, which may be code."""
    try:
        array = archive[name]
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        raise InputError(f"expected arrays of numbers, received {name!r} of Python objects") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"expected arrays of numbers, received {name!r}, which is no array")
    return array


def _put(tree: dict[str, Any], way: list[str], value: Any, what: str) -> None:
    for key in way[:-1]:
        tree = tree.setdefault(key, {}) if isinstance(tree, dict) else {}
    if not isinstance(tree, dict) or way[-1] in tree:
        raise InputError(f"expected a name of one array, received {what}, which is in the way of another")
    tree[way[-1]] = value


def _value(array: Any) -> Any:
    if array.dtype.kind not in "biufU" or (array.dtype.kind == "U" and array.ndim):
        raise InputError(f"expected arrays of numbers or truth values, received dtype={array.dtype}")
    return array.item() if array.ndim == 0 and array.dtype.kind in "bU" else array


def _container(value: Any) -> Any:
    """Return a list where the keys are 0, 1 and so on, and a mapping otherwise."""
    if not isinstance(value, Mapping):
        return value
    items = {key: _container(item) for key, item in value.items()}
    if set(items) == {str(index) for index in range(len(items))}:
        return [items[str(index)] for index in range(len(items))]
    return items
