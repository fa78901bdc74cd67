"""Whose code builds a bundle's model: the user's own, or that of others who are trusted. It is decided here alone."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, spoken
from ..sources.spec import runs_code
from .written import is_remembered


@dataclass(frozen=True)
class Trust:
    """What may be done to have a bundle's model.

    ``own`` says that its source is the user's own, who named it or wrote the bundle here (see `bundles.written`).
    ``code`` allows to run the code of any source, ``program`` to read a ``.pt2`` file; each says nothing of the other.
    """

    own: bool = False
    code: bool = False
    program: bool = False


def trust_in(directory: Path, source: str | None, *, code: bool, program: bool) -> Trust:
    """Return what may be done with the bundle in ``directory``, which names ``source``."""
    own = source is not None and runs_code(source) and is_remembered(directory, source)
    return Trust(own=own, code=code, program=program)


def is_trusted(source: str, trust: Trust) -> bool:
    """Return whether a bundle's source may be loaded: no code of its author's runs for it, or it is trusted."""
    return trust.own or trust.code or not runs_code(source)


def require_trusted(source: str, bundle: str | Path, trust: Trust) -> None:
    """Raise `InputError` unless the source that ``bundle``, a folder or a hub's repository, names may be loaded."""
    if not is_trusted(source, trust):
        way = spoken("add --trust-code", "pass trust_code=True, or a fresh model as model=")
        raise InputError(
            f"expected a bundle that is read without running its author's code, received source={source!r} in "
            f"{bundle}; if you trust that code, {way}"
        )
