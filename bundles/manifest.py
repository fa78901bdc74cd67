"""What a bundle's folder says of itself, and which folders are bundles."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal

from .. import __version__
from ..convert.recipe import Recipe
from ..data.preprocessing import Preprocessing
from ..errors import InputError, OutputExistsError, option, spoken
from ..formats.fields import read
from ..formats.place import Place, shown
from ..formats.seal import sealed, unsealed
from ..formats.text import json_object
from ..sources.hub import fetched, is_hub
from ..sources.listing import listing, require_listed
from ..sources.outputs import Kind, is_stage, require_output
from ..sources.spec import relative_spec
from ..sources.weights import SUFFIX

MANIFEST = "normswap.json"
RUN = "run"
"""The folder in a bundle that tells of the fine-tuning it came from; it is there before the rest."""
SETTINGS = "run.toml"
"""The file in it that is there first, which tells a run from any folder of that name."""
LOCK = ".lock"
"""The file beside it that keeps other runs out."""
SCHEMA_VERSION = 2
"""The first had no seal, and its list of files could be cut."""


@dataclass(frozen=True)
class Drifts:
    """How far a patch moved its model, as it told when it was made: ``expected`` by layer, and what was ``measured``.

    Both are shares of the root mean square of the layer's output. ``measured`` is on images, where the patch was given
    any, with what the layers before change, and has the model's outputs too; ``calibrated`` says that unlabelled images
    chose what the expected drift did not know.
    """

    expected: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    calibrated: bool = False

    def __post_init__(self) -> None:
        for name, value in [*self.expected.items(), *self.measured.items()]:
            if not 0 <= value < inf:
                raise InputError(f"expected a drift of 0 or more, received {value} for {name}")

    @classmethod
    def of(
        cls,
        expected: Mapping[str, float | None],
        measured: Mapping[str, float | None] | None = None,
        *,
        calibrated: bool = False,
    ) -> "Drifts":
        """Return what is known and finite of drifts."""
        return cls(_known(expected), _known(measured or {}), calibrated)

    def after(self, earlier: "Drifts") -> "Drifts":
        """Return these of a patch of what an earlier one made, whose layers keep what was expected of them."""
        return Drifts(earlier.expected | self.expected, self.measured, calibrated=self.calibrated or earlier.calibrated)


def _known(drifts: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in drifts.items() if value is not None and isfinite(value)}


@dataclass(frozen=True)
class Manifest:
    """What a bundle tells: how it was made, by which version, and the hashes of its files."""

    schema_version: Literal[2]
    normswap: str
    framework: Literal["torch", "keras"]
    source: str | None
    recipe: dict[str, Any]
    preprocessing: Preprocessing | None
    sha256: dict[str, str]
    drift: Drifts = field(default_factory=Drifts)


def read_manifest(directory: Path) -> tuple[Manifest, Recipe]:
    """Return what the manifest in ``directory`` says and the recipe in it, all files as they were saved.

    Raises `InputError` if it is no bundle's, has changed, or is not that of the files in the folder.
    """
    path = directory / MANIFEST
    if not path.is_file():
        received = f"a folder without {MANIFEST}" if directory.is_dir() else "no folder"
        advice = f"make one with {spoken('`normswap patch`', '`normswap.save`')}"
        if is_unfinished(directory):
            received, advice = "a fine-tuning run that has not ended", f"repeat it with {option('resume')}"
        raise InputError(f"expected a bundle in {directory}, received {received}; {advice}")
    place = Place(str(path), remedy="take the bundle from where it came once more, or patch the model again")
    data = json_object(path.read_bytes(), place)
    version = data.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise InputError(
            f"expected a bundle of schema_version={SCHEMA_VERSION} in {directory}, received "
            f"schema_version={shown(version)}; patch the model again"
        )
    manifest = read(Manifest, unsealed(data, place), place)
    recipe = Recipe.from_dict(manifest.recipe, place.of("recipe"))
    if recipe.framework != manifest.framework:
        raise InputError(place.of("recipe", "framework").said(repr(manifest.framework), repr(recipe.framework)))
    names = [f"{which}{suffix}" for which in ("model", "original") for suffix in SUFFIX.values()]
    require_listed(directory, manifest.sha256, [f"model{SUFFIX[recipe.framework]}"], names, place.of("sha256"))
    return manifest, recipe


def manifest_of(
    folder: Path,
    directory: Path,
    recipe: Recipe,
    source: str | None,
    preprocessing: Preprocessing | None,
    drift: Drifts | None = None,
) -> str:
    """Return the manifest of the weights in ``folder``, which are to lie in ``directory``.

    Raises `InputError` for a source of a name that is no text, which JSON cannot hold.
    """
    relative = None if source is None else relative_spec(source, directory)
    try:
        str(relative).encode()
    except UnicodeEncodeError:
        raise InputError(f"expected a source whose path is UTF-8, received {relative!r}; rename it") from None
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "normswap": __version__,
        "framework": recipe.framework,
        "source": relative,
        "recipe": recipe.to_dict(),
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "sha256": listing(folder),
        "drift": asdict(drift or Drifts()),
    }
    return json.dumps(sealed(manifest), indent=2) + "\n"


def local(place: str | Path) -> Path:
    """Return the folder of a bundle: a path as it is, of ``hf://OWNER/NAME`` what is fetched; raises as `fetched`."""
    return fetched(str(place), MANIFEST, "a bundle") if is_hub(place) else Path(place)


def is_bundle(path: str | Path) -> bool:
    """Return whether ``path`` is a folder with a bundle's manifest, or names what is to be one on a hub."""
    return is_hub(path) or (Path(path) / MANIFEST).is_file()


def is_unfinished(path: str | Path) -> bool:
    """Return whether ``path`` is a folder with a fine-tuning run that has not come to a bundle."""
    return (Path(path) / RUN / SETTINGS).is_file() and not is_bundle(path)


def is_empty(folder: Path) -> bool:
    """Return whether there is nothing in a folder but what a killed writer of a bundle or a run left."""
    return all(entry.name == LOCK or is_stage(entry.name) for entry in folder.iterdir())


def _is_replaceable(path: Path) -> bool:
    return is_bundle(path) or is_unfinished(path) or (path.is_dir() and is_empty(path))


BUNDLE = Kind("a bundle", _is_replaceable)
"""What a bundle may replace: another, an empty folder, and one with a fine-tuning run that has not come to a bundle."""


def require_replaceable(directory: Path, *, overwrite: bool) -> None:
    """Raise `OutputExistsError` if ``directory`` exists, unless it is a `BUNDLE` and may be overwritten."""
    if directory.name and not overwrite and is_unfinished(directory):
        raise OutputExistsError(
            f"expected an output path that does not exist, received {directory} with a fine-tuning run that has not "
            f"ended; add {option('resume')} to go on with it, or {option('overwrite')}"
        )
    require_output(directory, overwrite=overwrite, kind=BUNDLE)
