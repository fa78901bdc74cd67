"""What a bundle's folder says of itself, and which folders are bundles."""

import json
from pathlib import Path
from typing import Any

from .. import __version__
from ..convert.recipe import Recipe
from ..data.preprocessing import Preprocessing
from ..errors import InputError, OutputExistsError, option, spoken
from ..sources.files import sha256
from ..sources.outputs import Kind, require_output
from ..sources.spec import relative_spec
from ..sources.weights import SUFFIX

MANIFEST = "normswap.json"
RUN = "run"
"""The folder in a bundle that tells of the fine-tuning it came from; it is there before the rest."""
SCHEMA_VERSION = 1


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return what the manifest in ``directory`` says, every file it lists as it was saved.

    Raises `InputError` if it is no bundle's or a file is missing or has changed.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        version = manifest["schema_version"]
        if version != SCHEMA_VERSION:
            raise InputError(f"expected a bundle of schema_version={SCHEMA_VERSION}, received schema_version={version}")
        if manifest["framework"] not in SUFFIX:
            raise InputError(f"expected a framework out of torch, keras, received {manifest['framework']!r}")
        hashes = dict(manifest["sha256"])
        manifest["recipe"], manifest["source"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        if not (directory / MANIFEST).exists():
            received = f"a folder without {MANIFEST}" if directory.is_dir() else "no folder"
            advice = f"make one with {spoken('`normswap patch`', '`normswap.save`')}"
            if is_unfinished(directory):
                received, advice = "a fine-tuning run that has not ended", f"repeat it with {option('resume')}"
            raise InputError(f"expected a bundle in {directory}, received {received}; {advice}") from None
        raise InputError(f"expected a bundle in {directory}, received a folder without one: {error}") from None
    for name, digest in hashes.items():
        file = directory / Path(name).name
        if not file.is_file() or sha256(file) != digest:
            raise InputError(f"expected {file} as it was saved, received a file that is missing or has changed")
    return manifest  # type: ignore[no-any-return]


def manifest_of(
    folder: Path, directory: Path, recipe: Recipe, source: str | None, preprocessing: Preprocessing | None
) -> str:
    """Return the manifest of the weights in ``folder``, which are to lie in ``directory``."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "normswap": __version__,
        "framework": recipe.framework,
        "source": None if source is None else relative_spec(source, directory),
        "recipe": recipe.to_dict(),
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "sha256": {file.name: sha256(file) for file in sorted(folder.iterdir())},
    }
    return json.dumps(manifest, indent=2) + "\n"


def is_bundle(path: str | Path) -> bool:
    """Return whether ``path`` is a folder with a bundle's manifest."""
    return (Path(path) / MANIFEST).is_file()


def is_unfinished(path: str | Path) -> bool:
    """Return whether ``path`` is a folder with a fine-tuning run that has not come to a bundle."""
    return (Path(path) / RUN).is_dir() and not is_bundle(path)


def _is_replaceable(path: Path) -> bool:
    return is_bundle(path) or is_unfinished(path) or (path.is_dir() and not any(path.iterdir()))


BUNDLE = Kind("a bundle", _is_replaceable)
"""What a bundle may replace: another, an empty folder, and one with a fine-tuning run that has not come to a bundle."""


def require_replaceable(directory: Path, *, overwrite: bool) -> None:
    """Raise `OutputExistsError` if ``directory`` exists, unless it is a `BUNDLE` and may be overwritten."""
    if not overwrite and is_unfinished(directory):
        raise OutputExistsError(
            f"expected an output path that does not exist, received {directory} with a fine-tuning run that has not "
            f"ended; add {option('resume')} to go on with it, or {option('overwrite')}"
        )
    require_output(directory, overwrite=overwrite, kind=BUNDLE)
