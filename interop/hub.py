"""A bundle to a repository of the Hugging Face Hub: its files and a card, in one commit."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..bundles.manifest import MANIFEST, RUN, Manifest, read_manifest
from ..convert.recipe import Recipe
from ..errors import InputError, OutputExistsError, UsageError, option
from ..finetune.run.journal import METRICS
from ..sources.hub import PREFIX, answered, bars, library, parsed
from ..sources.spec import absolute_spec
from ..sources.weights import SUFFIX
from .card import card

if TYPE_CHECKING:
    from ..verification.file import Proved

CARD, ONNX = "README.md", "model.onnx"
_PLAIN = (CARD, ".gitattributes")
"""What a hub puts into a repository by itself."""


@dataclass(frozen=True)
class Pushed:
    """What was written to a hub: the repository, its address, the commit, and its files."""

    repo: str
    url: str
    commit: str
    files: list[str]


def push(
    directory: Path,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    license: str | None = None,
    onnx: Path | None = None,
    overwrite: bool = False,
) -> Pushed:
    """Write the bundle in ``directory`` to the repository ``repo``, OWNER/NAME, of a hub, with a model card.

    The repository is made if it is not there, ``private`` or not. All is one commit: a push that fails leaves a bundle
    that was there whole. Of a run only the curves go along, since its settings name paths; code does if it is in the
    bundle. ``license`` and ``onnx``, a file made of the bundle, are told in the card, and the file lies beside it.

    Raises:
        InputError: If it is no bundle, or ``onnx`` no file of it, and if the hub does not answer or forbids it.
        OutputExistsError: If the repository holds a bundle that may not be overwritten, or something else.
        UsageError: If it is there and not ``private`` though it should be.
        MissingDependencyError: If `huggingface_hub` is not installed.
    """
    name, revision = parsed(f"{PREFIX}{repo}")
    if revision is not None:
        raise InputError(f"expected a repository as OWNER/NAME, received {repo}")
    manifest, recipe = read_manifest(directory)
    proof = None if onnx is None else _proof(onnx, recipe)
    files, code = _files(directory, manifest)
    if onnx is not None:
        files[ONNX] = onnx
    text = card(directory, manifest, recipe, name, license=license, proof=proof, code=code)
    hub = library()
    api = hub.HfApi(library_name="normswap", library_version=__version__)
    with answered(name, leave="write"), bars(hub.utils):
        there = _there(api, name)
        _require_free(there, name, private=private, overwrite=overwrite)
        if there is None:
            api.create_repo(name, private=private)
        stale = sorted(_ours() & _names(there) - files.keys())
        done = api.create_commit(
            name,
            [
                hub.CommitOperationAdd(CARD, text.encode()),
                *(hub.CommitOperationAdd(path, file) for path, file in files.items()),
                *(hub.CommitOperationDelete(path) for path in stale),
            ],
            commit_message=message or f"Push a bundle with normswap {__version__}",
            parent_commit=None if there is None else there.sha,
        )
    return Pushed(name, f"{api.endpoint}/{name}", str(done.oid), sorted([CARD, *files]))


def _there(api: Any, repo: str) -> Any:
    """Return what the hub tells of a repository, None where it is not there or not to be seen."""
    from huggingface_hub import errors

    try:
        return api.model_info(repo)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        return None


def _names(there: Any) -> set[str]:
    return set() if there is None else {each.rfilename for each in there.siblings or ()}


def _require_free(there: Any, repo: str, *, private: bool, overwrite: bool) -> None:
    if there is None:
        return
    if private and not there.private:
        raise UsageError(
            f"expected a private repository for {option('private')}, received {repo}, which is there and public; "
            "push to another one"
        )
    names = _names(there)
    if names <= {*_PLAIN}:
        return
    if MANIFEST not in names:
        raise OutputExistsError(
            f"expected a repository with a bundle or nothing in it, received {repo} with {len(names)} files of others; "
            "push to another one"
        )
    if not overwrite:
        raise OutputExistsError(f"expected a repository without a bundle, received {repo}; add {option('overwrite')}")


def _ours() -> set[str]:
    """Return the names of files that a bundle of another kind may have left."""
    weights = {f"{which}{suffix}" for which in ("model", "original") for suffix in SUFFIX.values()}
    return {*weights, f"{RUN}/{METRICS}", ONNX}


def _files(directory: Path, manifest: Manifest) -> tuple[dict[str, Path], str | None]:
    """Return the files of a bundle that are pushed, by name, and the name of that with its source's code, if any."""
    files = {name: directory / name for name in (MANIFEST, *manifest.sha256)}
    if (directory / RUN / METRICS).is_file():
        files[f"{RUN}/{METRICS}"] = directory / RUN / METRICS
    location = absolute_spec(manifest.source or "", directory).rpartition(":")[0]
    code = Path(location)
    if location.endswith(".py") and code.is_relative_to(directory.resolve()) and code.is_file():
        name = code.relative_to(directory.resolve()).as_posix()
        files[name] = code
        return files, name
    return files, None


def _proof(path: Path, recipe: Recipe) -> "Proved":
    """Return the verdict that an ONNX file tells; raises `InputError` unless it is one of the recipe's norms."""
    from ..verification.file import read_model

    file = read_model(path)
    if any(tensor.external_data for tensor in file.proto.graph.initializer):
        raise InputError(f"expected an ONNX file of one piece, received {path}, whose weights lie beside it")
    told, proved = file.metadata.get("norms"), file.proved
    if proved is None:
        raise InputError(
            f"expected an ONNX file that `normswap export` proved, received {path}, which tells no verdict"
        )
    norms = {name: facts.get("kind") for name, facts in told.items()} if isinstance(told, dict) else {}
    wanted = {choice.name: choice.target.kind for choice in recipe.choices}
    if norms != wanted:
        raise InputError(
            f"expected an ONNX file of the bundle, with its {len(wanted)} norms, received {path} with {len(norms)} of "
            "other names or kinds"
        )
    return proved
