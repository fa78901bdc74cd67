"""Reading that trusts nothing and writing that loses nothing."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, OutputExistsError


def require_absent(path: Path, *, overwrite: bool) -> None:
    """Raise `OutputExistsError` if ``path`` exists, unless it may be overwritten; call it before the long work."""
    if path.exists() and not overwrite:
        raise OutputExistsError(f"expected an output path that does not exist, received {path}; add --overwrite")


@contextmanager
def staged(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, and move it to ``path`` if the body succeeds.

    What else the body writes into the temporary path's folder moves beside ``path`` too, before it. The content is
    flushed to disk before the move. If the body fails, nothing is left and what stood at ``path`` before is untouched.

    Raises `OutputExistsError` if ``path`` exists and may not be overwritten.
    """
    require_absent(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    retired = path.with_name(f".{path.name}.old-{os.getpid()}")
    _remove(folder)
    folder.mkdir()
    try:
        yield folder / path.name
        for file in folder.rglob("*"):
            _flush(file)
        if path.is_dir():  # a folder cannot be replaced in one step
            os.replace(path, retired)
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == path.name):
            os.replace(entry, path.with_name(entry.name))
        _flush(path.parent)
    except BaseException:
        if retired.exists() and not path.exists():
            os.replace(retired, path)
        raise
    finally:
        _remove(folder)
        _remove(retired)


def require_file(path: Path, what: str = "a model or weights") -> None:
    """Raise `InputError` unless ``path`` is a file that could hold ``what``.

    An empty file, a git-LFS pointer and a web page saved under a model's name are told apart by content.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise InputError(f"expected a file at {path}, received {found} there")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise InputError(f"expected {what} in {path}, received an empty file")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"expected {what} in {path}, received a git-LFS pointer; run `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise InputError(f"expected {what} in {path}, received a web page; download the file again")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
