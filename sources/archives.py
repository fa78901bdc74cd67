"""Zip archives, as ``.npz``, ``.keras`` and PyTorch's files are: whole, and of about the size they unpack to."""

from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile, ZipFile, is_zipfile

from ..errors import InputError

MOST, RATIO = 1 << 29, 100
"""An archive that unpacks to more bytes than this, and to more than so many times its own, holds nothing but a trap:
weights hardly shrink at all."""


def is_archive(path: Path) -> bool:
    """Return whether a file is a zip archive, maybe a damaged one."""
    try:
        return is_zipfile(path)
    except BadZipFile:  # which Python raises for some
        return True


def require_honest(path: Path, what: str) -> None:
    """Raise `InputError` unless ``path`` is an archive, and unpacks to no more than one with ``what`` in it may.

    Sizes are told by the archive's directory; nothing is unpacked.
    """
    _require(path, what, lambda archive: None)


def require_whole(path: Path, what: str) -> None:
    """Raise `InputError` as `require_honest` does, and unless all in the archive is as it was packed.

    A checksum that is 0 everywhere, as PyTorch writes where it is told to compute none, tells nothing.
    """
    _require(path, what, lambda archive: archive.testzip() if any(each.CRC for each in archive.infolist()) else None)


def _require(path: Path, what: str, damaged: Callable[[ZipFile], str | None]) -> None:
    if not is_archive(path):
        raise InputError(f"expected {what} in {path}, received a truncated archive, or a file of another kind")
    try:
        with ZipFile(path) as archive:
            unpacked, packed = sum(each.file_size for each in archive.infolist()), path.stat().st_size
            if unpacked > max(MOST, RATIO * packed):
                raise InputError(
                    f"expected {what} in {path}, received an archive of {size(packed)} that unpacks to "
                    f"{size(unpacked)}; if it is what you want, pack it without compression"
                )
            bad = damaged(archive)
    except InputError:
        raise
    except Exception as error:  # zipfile's own errors have no class in common
        raise InputError(f"expected {what} in {path}, received a damaged file: {error}") from None
    if bad is not None:
        raise InputError(
            f"expected {what} in {path}, received a damaged file: {bad} is not what its checksum says; get the file "
            "once more"
        )


def size(count: int) -> str:
    """Return a number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"
