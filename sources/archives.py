"""Zip archives, as ``.npz``, ``.keras`` and PyTorch's files are: whole, and of about the size they unpack to."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from zipfile import BadZipFile, ZipFile, is_zipfile

from ..errors import InputError
from .files import damaged

_MOST, RATIO = 1 << 28, 100
"""A file that unpacks to more bytes than this, and to more than so many times its own, holds nothing but a trap:
weights hardly shrink at all."""


def most_in(packed: int) -> int:
    """Return how many bytes a file of so many may unpack to."""
    return max(_MOST, RATIO * packed)


def is_archive(path: Path) -> bool:
    """Return whether a file is a zip archive, maybe a damaged one."""
    try:
        return is_zipfile(path)
    except BadZipFile:  # which Python raises for some
        return True


def require_honest(path: Path, what: str) -> None:
    """Raise `InputError` unless ``path`` is an archive that unpacks to no more than one with ``what`` in it may.

    Sizes are told by the archive's directory, and so are names, of which none may lead out of a folder; nothing is
    unpacked.
    """
    _require(path, what, lambda archive: None)


def require_whole(path: Path, what: str) -> None:
    """Raise `InputError` as `require_honest` does, and unless all in the archive is as it was packed.

    A checksum that is 0 everywhere, as PyTorch writes where it is told to compute none, tells nothing.
    """
    _require(path, what, lambda archive: archive.testzip() if any(each.CRC for each in archive.infolist()) else None)


def _require(path: Path, what: str, first_changed: Callable[[ZipFile], str | None]) -> None:
    if not is_archive(path):
        raise InputError(f"expected {what} in {path}, received a truncated archive, or a file of another kind")
    try:
        with ZipFile(path) as archive:
            if (leaving := next(filter(_leaves, archive.namelist()), None)) is not None:
                raise InputError(
                    f"expected {what} in {path}, received an archive with {leaving!r}, a name that leads out of it; do "
                    "not unpack it"
                )
            unpacked, packed = sum(each.file_size for each in archive.infolist()), path.stat().st_size
            if unpacked > most_in(packed):
                raise InputError(
                    f"expected {what} in {path}, received an archive of {size(packed)} that unpacks to "
                    f"{size(unpacked)}; if it is what you want, pack it without compression"
                )
            bad = first_changed(archive)
    except InputError:
        raise
    except Exception as error:  # zipfile's own errors have no class in common
        raise damaged(what, path, str(error)) from None
    if bad is not None:
        raise damaged(what, path, f"{bad} is not what its checksum says")


def _leaves(name: str) -> bool:
    """Return whether a member's name leads out of the folder that an archive is unpacked into, on any system."""
    ways = PurePosixPath(name), PureWindowsPath(name)
    return any(way.is_absolute() or way.drive or way.root or ".." in way.parts for way in ways)


def size(count: int) -> str:
    """Return a number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"
