"""A repository of the Hugging Face Hub in place of a folder: ``hf://OWNER/NAME``, by `huggingface_hub` and its cache.

What goes wrong there is told here in whole sentences, for whoever reads from a hub or writes to one.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, MissingDependencyError, missing

PREFIX = "hf://"
FORM = "hf://OWNER/NAME or hf://OWNER/NAME@REVISION"
_REVISION = r"[^\s@\x00-\x1f\ud800-\udfff]+"
_SPEC = re.compile(rf"hf://(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>{_REVISION}))?", re.ASCII)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def is_hub(spec: Any) -> bool:
    """Return whether ``spec`` names a repository of a hub."""
    return isinstance(spec, str) and spec.startswith(PREFIX)


def parsed(spec: str) -> tuple[str, str | None]:
    """Return the repository and the revision in ``spec``; raises `InputError` if there is none."""
    found = _SPEC.fullmatch(spec)
    if found is None or ".." in spec or "--" in found["repo"]:
        raise InputError(f"expected {FORM}, received {spec}")
    return found["repo"], found["revision"]


def fetched(spec: str, needed: str, what: str) -> Path:
    """Return the folder in `huggingface_hub`'s cache with all files of the repository that ``spec`` names.

    Without a connection that is what was fetched before. A repository without the file ``needed`` is fetched no
    further: it is no ``what``.

    Raises `InputError` if there is no such repository or revision, it may not be read, or the hub does not answer,
    `MissingDependencyError` if `huggingface_hub` is not installed.
    """
    repo, revision = parsed(spec)
    hub = library()
    with answered(repo, revision), bars(hub.utils):
        from huggingface_hub import constants, errors

        try:
            hub.hf_hub_download(repo, needed, revision=revision)
        except errors.RemoteEntryNotFoundError:
            raise InputError(
                f"expected {what} in {spec}, received a repository without {needed} at {constants.ENDPOINT}; "
                "make one with `normswap push`"
            ) from None
        return Path(hub.snapshot_download(repo, revision=revision))


def library() -> Any:
    """Return `huggingface_hub`; raises `MissingDependencyError` if it is not installed."""
    try:
        import huggingface_hub.utils
    except ModuleNotFoundError:
        raise MissingDependencyError(missing("huggingface_hub", PREFIX)) from None
    return huggingface_hub


@contextmanager
def answered(repo: str, revision: str | None = None, leave: str = "read") -> Iterator[None]:
    """Have what goes wrong between here and the hub raise `InputError`, by what it means.

    ``leave`` says whether to "read" or to "write" is asked for.
    """
    library()
    from huggingface_hub import constants, errors

    at = constants.ENDPOINT
    try:
        yield
    except InputError:
        raise
    except Exception as raised:
        error: BaseException = raised
        while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError):
            told = (
                f"expected leave to {leave} {repo} at {at}, received status {status}: it is gated; ask for access at "
                f"{at}/{repo}, and {_LOG_IN}"
            )
        elif isinstance(error, errors.RepositoryNotFoundError):
            told = (
                f"expected a repository {repo} at {at}, received none that can be seen; check its name, and if it is "
                f"private {_LOG_IN}"
            )
        elif isinstance(error, errors.RevisionNotFoundError):
            told = f"expected a revision of {repo} at {at}, received {revision!r}, which it has not"
        elif status in (401, 403):
            told = (
                f"expected leave to {leave} {repo} at {at}, received status {status}; {_LOG_IN} to a token that may "
                f"{leave} it"
            )
        elif status is not None:
            told = f"expected {at} to {leave} {repo}, received status {status}; try again later"
        elif isinstance(error, errors.OfflineModeIsEnabled):
            told = f"expected an answer of {at} for {repo}, received none, since HF_HUB_OFFLINE is set; unset it"
        elif isinstance(error, errors.LocalEntryNotFoundError | ConnectionError) or _is_of_client(error):
            told = (
                f"expected an answer of {at} for {repo}, received none{_said(error)}; check the connection, and "
                "HF_ENDPOINT if that is set"
            )
        else:
            raise
        raise InputError(told) from None


@contextmanager
def bars(tools: Any) -> Iterator[None]:
    """Let `huggingface_hub.utils`, or `datasets`, draw their progress bars on a terminal only."""
    if sys.stderr.isatty() or tools.are_progress_bars_disabled():
        yield
        return
    tools.disable_progress_bars()
    try:
        yield
    finally:
        tools.enable_progress_bars()


def _is_of_client(error: BaseException) -> bool:
    """Return whether an error is one of the HTTP client's, which has been called by several names."""
    return any(each.__module__.partition(".")[0].startswith("httpx") for each in type(error).__mro__)


def _said(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f": {first}" if first else ""
