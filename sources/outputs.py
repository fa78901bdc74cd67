"""Writing that loses nothing: an output appears whole under its name, and what it replaces stays until then."""

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import OutputExistsError, option
from .files import is_name

STAGE = ".normswap-"
"""How the folder is called, before a hash of an output's name, in which the output is made beside its place."""

_NEW, _OLD = "new", "old"


@dataclass(frozen=True)
class Kind:
    """What an output is: ``name`` for messages, and what tells whether something is of that kind, to be replaced."""

    name: str
    includes: Callable[[Path], bool]


FILE = Kind("a regular file", Path.is_file)


def require_name(path: Path) -> None:
    """Raise `OutputExistsError` for an output that nothing can be called: with a NUL, or with what no bytes are."""
    if not is_name(path):
        raise OutputExistsError(
            f"expected an output that a file can be called, received {str(path)!r}; write to another output"
        )


def require_output(path: Path, *, overwrite: bool, kind: Kind = FILE, sources: Iterable[str | Path] = ()) -> None:
    """Raise `OutputExistsError` unless an output can take its place at ``path``; call it before the long work.

    It can where nothing is yet, and with ``overwrite`` in place of something of its own ``kind``: never of a link, of a
    device or of one of the ``sources`` it is made from, which may be files, folders of files, or no paths at all.
    """
    require_name(path)
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
    flushed to the disk, with modes by the umask, and changes places with what stood at ``path`` in one step. If the
    body fails, nothing is left and what stood there before is untouched. Killed, it leaves a folder that the next
    writer beside it clears; only on a system that cannot exchange two folders can one be without its name till then.

    Raises `OutputExistsError` if ``path`` exists and may not be overwritten, or is of another ``kind``, or
    if another process is writing it.
    """
    require_output(path, overwrite=overwrite, kind=kind)
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    clear(path.parent)
    with _own(path) as stage:
        require_output(path, overwrite=overwrite, kind=kind)  # which another may have written by now
        new = stage / _NEW / path.name
        new.parent.mkdir()
        yield new
        _settle(new.parent)
        for entry in new.parent.iterdir():
            if entry != new:
                _place(entry, path.with_name(entry.name), stage, overwrite=overwrite, kind=FILE)
        _place(new, path, stage, overwrite=overwrite, kind=kind)
        _flush(path.parent)


def clear(folder: Path) -> None:
    """Remove what dead processes left in a folder, and give what they were replacing its name back."""
    for stage in folder.glob(f"{STAGE}*"):
        with _held(stage, unlockable=False) as free:
            if free:
                _recover(stage)
                shutil.rmtree(stage, ignore_errors=True)


def is_stage(name: str) -> bool:
    """Return whether an entry of a folder is one in which an output is made, or was."""
    return name.startswith(STAGE)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Tell an error of the system by the output it is about, not by where that is made."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            f"expected a folder to write {path.name} into, received {path.parent}: {error.strerror}"
        ) from error


@contextmanager
def _own(path: Path) -> Iterator[Path]:
    """Make the folder for an output and hold it; none but the process that does writes the output.

    Raises `OutputExistsError` if another process holds it.
    """
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]  # names may be as long as a name can be
    stage = path.with_name(f"{STAGE}{digest}")
    while True:
        with _told(path):
            stage.mkdir(exist_ok=True)
        with _held(stage, unlockable=True) as held:
            if held is None:  # removed between making and holding it
                continue
            if not held:
                raise OutputExistsError(
                    f"expected an output that no other process is writing, received {path}; "
                    "wait for that one to end, or write to another output"
                )
            try:
                for left in stage.iterdir():  # of one that died since the folder was cleared
                    _recover(stage)
                    shutil.rmtree(left)
                yield stage
            finally:
                _recover(stage)
                shutil.rmtree(stage)
            return


@contextmanager
def _held(stage: Path, *, unlockable: bool) -> Iterator[bool | None]:
    """Hold a folder against other processes: yield whether it is, and None if it is gone.

    A file system without locks gives ``unlockable``.
    """
    try:
        descriptor = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    except OSError:  # not ours
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield False if isinstance(error, BlockingIOError) else unlockable
            return
        yield True if _is_at(descriptor, stage) else None
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _recover(stage: Path) -> None:
    """Give what was being replaced its name back, if nothing has it."""
    for old in (stage / _OLD).glob("*"):
        if not os.path.lexists(place := stage.parent / old.name):
            os.replace(old, place)


def _settle(folder: Path) -> None:
    """Give all in a folder the modes that new files have, and flush it to the disk."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666  # some libraries make files that none but the owner reads
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
            path.chmod(mode)
        _flush(path)
    _flush(folder)


def _place(new: Path, path: Path, stage: Path, *, overwrite: bool, kind: Kind) -> None:
    """Move an output to its place, in one step where the system has one."""
    is_there = os.path.lexists(path)
    require_output(path, overwrite=overwrite, kind=kind)  # which may have come meanwhile
    if not is_there:
        if _rename(new, path, _Flag.NO_REPLACE):
            return
        if not new.is_dir():
            os.link(new, path)  # which fails where something has come
            return
        os.rename(new, path)  # which fails where more than an empty folder has come
        return
    if not path.is_dir():
        os.replace(new, path)
        return
    if _rename(new, path, _Flag.EXCHANGE):
        return
    old = stage / _OLD / path.name
    old.parent.mkdir()
    os.rename(path, old)
    os.rename(new, path)


class _Flag:
    """What a rename may do besides, as Linux and macOS number it."""

    NO_REPLACE = (1, 4)
    EXCHANGE = (2, 2)


_UNABLE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_AT_FDCWD = -100


def _rename(source: Path, target: Path, flag: tuple[int, int]) -> bool:
    """Rename as ``flag`` says and return True, or False where the system or the file system cannot.

    Raises `OutputExistsError` if there is something where nothing should be.
    """
    call = _system_call()
    if call is None or call(os.fsencode(source), os.fsencode(target), flag) == 0:
        return call is not None
    number = ctypes.get_errno()
    if number in _UNABLE:
        return False
    if number == errno.EEXIST:
        raise OutputExistsError(
            f"expected an output path that does not exist, received {target}, which has come meanwhile"
        )
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@cache
def _system_call() -> Callable[[bytes, bytes, tuple[int, int]], int] | None:
    """Return what renames with a flag; None where the C library has nothing of the kind."""
    library: Any = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):
        return lambda source, target, flag: int(library.renameat2(_AT_FDCWD, source, _AT_FDCWD, target, flag[0]))
    if hasattr(library, "renamex_np"):
        return lambda source, target, flag: int(library.renamex_np(source, target, flag[1]))
    return None


def _flush(path: Path) -> None:
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
