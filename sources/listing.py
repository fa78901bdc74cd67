"""What a folder holds, each file by its content, so that a file that is missing, changed or put in is seen."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import InputError
from ..formats.place import Place, shown
from .files import sha256


def listing(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder, by name."""
    return {file.name: sha256(file) for file in sorted(folder.iterdir())}


def require_listed(
    folder: Path, hashes: Mapping[str, str], needed: Iterable[str], read: Iterable[str], at: Place
) -> None:
    """Raise `InputError` unless the files of a folder are those listed ``at`` a place.

    All listed are there, as they were; those ``needed`` are listed, and so is what is there under one of the names that
    may be ``read``.
    """
    for name in hashes:
        if name in ("", ".", "..") or {"/", "\\", "\0"} & {*name}:
            raise InputError(at.said("names of files", shown(name)))
    if missing := [name for name in needed if name not in hashes]:
        raise InputError(at.said(f"the hash of {' and '.join(missing)}", ", ".join(hashes) or "none"))
    for name in read:
        if name not in hashes and (folder / name).exists():
            raise InputError(at.said("every file beside it", f"{name}, which is there and not listed"))
    way = at.remedy and f"; {at.remedy}"
    for name, digest in hashes.items():
        file = folder / name
        if leads_elsewhere(file) or not file.is_file() or sha256(file) != digest:
            raise InputError(f"expected {file} as it was saved, received a file that is missing or has changed{way}")


def leads_elsewhere(file: Path) -> bool:
    """Return whether a file is a link, but for one of `huggingface_hub`'s cache, which keeps all files apart by hash.

    There ``models--OWNER--NAME/snapshots/REVISION/FILE`` leads to ``models--OWNER--NAME/blobs/HASH``.
    """
    if not file.is_symlink():
        return False
    repository = file.parent.parent.parent
    return file.parent.parent.name != "snapshots" or file.resolve().parent != (repository / "blobs").resolve()
