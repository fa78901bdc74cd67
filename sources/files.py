"""Reading that trusts nothing."""

import hashlib
import os
import re
from pathlib import Path

from ..errors import InputError

_WEB_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<[!?a-zA-Z]")
"""HTML, and the XML in which a store of files says that there is none."""


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
    if _WEB_PAGE.match(head) and b"\0" not in head:
        raise InputError(f"expected {what} in {path}, received a web page; download the file again")


def damaged(what: str, path: Path, why: str) -> InputError:
    """Return the error about a file that should hold ``what``, and is not as it was written."""
    return InputError(f"expected {what} in {path}, received a damaged file: {why.rstrip('.')}; get the file once more")


def is_text(path: Path) -> bool:
    """Return whether a path is text, in UTF-8: names of files need not be, and libraries ask for it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_name(path: str | Path) -> bool:
    """Return whether something can be called so: with no NUL, and nothing that the locale has no bytes for."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def as_utf8(name: str) -> str:
    """Return a path as UTF-8 has it, which files tell it in, whatever encoding the locale reads its bytes by."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def as_here(name: str) -> str:
    """Return a path that a file tells in UTF-8 as the locale has it; raises `ValueError` for what is no text."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
