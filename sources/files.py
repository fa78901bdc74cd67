"""Reading that trusts nothing and writing that loses nothing."""

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, OutputExistsError, option


@dataclass(frozen=True)
class Kind:
    """What an output is: ``name`` for messages, and what tells whether something is of that kind, to be replaced."""

    name: str
    includes: Callable[[Path], bool]


FILE = Kind("a regular file", Path.is_file)


def require_output(path: Path, *, overwrite: bool, kind: Kind = FILE, sources: Iterable[str | Path] = ()) -> None:
    """Raise `OutputExistsError` unless an output can take its place at ``path``; call it before the long work.

    It can where nothing is yet, and with ``overwrite`` in place of something of its own ``kind``: never of a link, of a
    device or of one of the ``sources`` it is made from, which may be files, folders of files, or no paths at all.
    """
    if path.name in ("", ".."):
        raise OutputExistsError(f"expected an output with a name of its own, received {path}; write to another output")
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise OutputExistsError(
            f"expected an output path that does not exist, received {path}; add {option('overwrite')}"
        )
    if path.is_symlink() or not kind.includes(path):
        found = described(path)
        raise OutputExistsError(f"expected {kind.name} to overwrite, received {path}, {found}; write to another output")
    for source in map(Path, sources):
        if source.exists() and (source.samefile(path) or source.resolve() in path.resolve().parents):
            raise OutputExistsError(
                f"expected an output that is not read from, received {path}, which {source} needs; "
                "write to another output"
            )


def described(path: Path) -> str:
    """Return what is at ``path``, for a message."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a file" if stat.S_ISREG(mode) else "a device or pipe"


@contextmanager
def staged(path: Path, *, overwrite: bool = False, kind: Kind = FILE) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, and move it to ``path`` if the body succeeds.

    What else the body writes into the temporary path's folder moves beside ``path`` too, before it. The content is
    flushed to disk before the move. If the body fails, nothing is left and what stood at ``path`` before is untouched.

    Raises `OutputExistsError` if ``path`` exists and may not be overwritten, or is of another ``kind``.
    """
    require_output(path, overwrite=overwrite, kind=kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    retired = path.with_name(f".{path.name}.old-{os.getpid()}")
    _remove(folder)
    folder.mkdir()
    try:
        yield folder / path.name
        for file in folder.rglob("*"):
            _flush(file)
        require_output(path, overwrite=overwrite, kind=kind)  # which may have come meanwhile
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


def is_text(path: Path) -> bool:
    """Return whether a path is text, in UTF-8: names of files need not be, and libraries ask for it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


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
