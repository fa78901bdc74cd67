"""Which bundles were written on this machine, kept outside of them, where whoever sends a bundle cannot write.

A small JSON file tells of each by its path what its manifest was and which code it is built by. Nothing depends on it:
where it cannot be written or read, no bundle is known.
"""

import importlib.util
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..sources.files import as_utf8, sha256
from ..sources.outputs import staged
from .manifest import MANIFEST

FILE = "bundles.json"
SCHEMA_VERSION = 1
MOST = 1000
"""How many bundles are known; the one that was written first is forgotten first."""

_WAIT = 10
"""Seconds for other processes to have written."""
_FAILS = (OSError, ValueError, RuntimeError)


def remember(directory: Path, source: str) -> None:
    """Note that the bundle in ``directory`` was written here, built by the code ``source`` of its writer's own.

    Code within the bundle's folder is not noted, since it goes where the bundle goes.
    """
    with suppress(*_FAILS):
        told = _told(directory, source)
        file = _file()
        if told is None or file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=_WAIT):
            known = _read(file)
            known.pop(_name(directory), None)
            known[_name(directory)] = told
            kept = dict(list(known.items())[-MOST:])
            with staged(file, overwrite=True) as temporary:
                text = json.dumps({"schema_version": SCHEMA_VERSION, "bundles": kept}, indent=1)
                temporary.write_text(text, encoding="utf-8")


def is_remembered(directory: Path, source: str) -> bool:
    """Return whether `remember` noted just this: this path, this manifest, not touched since, and this code."""
    with suppress(*_FAILS):
        told, file = _told(directory, source), _file()
        return told is not None and file is not None and _read(file).get(_name(directory)) == told
    return False


def _told(directory: Path, source: str) -> dict[str, Any] | None:
    """Return what tells a bundle and its code from others, None for code that nobody can call their own."""
    manifest, place = directory / MANIFEST, _place(source)
    if place is None or Path(place).is_relative_to(directory.resolve()):
        return None
    # The time cannot be set: a copy of the bundle that is unpacked over it, maybe with other code, has another one.
    changed = manifest.stat().st_ctime_ns
    return {"manifest": sha256(manifest), "changed": changed, "source": as_utf8(source), "code": as_utf8(place)}


def _name(directory: Path) -> str:
    """Return the path of a bundle, the same in every locale."""
    return as_utf8(str(directory.resolve()))


def _place(source: str) -> str | None:
    """Return the file that a source's code is in, or its package's, which is not imported for that."""
    location, _, _ = source.rpartition(":")
    if location.endswith(".py"):
        return str(Path(location).resolve())
    with suppress(ImportError, AttributeError, ValueError):
        found = importlib.util.find_spec(source.partition(":")[0].partition(".")[0])
        return None if found is None else found.origin or next(iter(found.submodule_search_locations or ()), None)
    return None


def _file() -> Path | None:
    """Return where bundles are noted: by the XDG rules, by which a path that is not absolute is none."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    folder = given if given.is_absolute() else Path.home() / ".local" / "state"
    return folder / "normswap" / FILE if folder.is_absolute() else None


def _read(file: Path) -> dict[str, Any]:
    """Return what is noted, by path; nothing where the file is missing, damaged or of another version."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return dict(data["bundles"]) if data["schema_version"] == SCHEMA_VERSION else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
