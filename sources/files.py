"""Reading that trusts nothing."""

import hashlib
from pathlib import Path

from ..errors import InputError


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
