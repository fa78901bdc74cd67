"""A bundle: a folder that holds a patched model, how it was made, and the original it was made from."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from .. import __version__
from ..convert.recipe import Recipe
from ..errors import InputError, OutputExistsError
from ..sources.data import Preprocessing
from ..sources.files import Kind, require_output, sha256, staged
from ..sources.framework import example_input, framework_of
from ..sources.models import absolute_spec, load_keras_weights, load_model, relative_spec
from .model import as_module

MANIFEST = "normswap.json"
RUN = "run"
"""The folder in a bundle that tells of the fine-tuning it came from; it is there before the rest."""
SCHEMA_VERSION = 1
SUFFIX = {"torch": ".safetensors", "keras": ".keras"}


class Patched(Protocol):
    """A patched model with the recipe that made it, such as a `Report` or a `Bundle`."""

    @property
    def model(self) -> Any:
        """The patched model."""

    @property
    def recipe(self) -> Recipe:
        """What it was made by."""


@dataclass
class Bundle:
    """What a bundle's folder holds, the model loaded."""

    directory: Path
    model: Any
    recipe: Recipe
    source: str | None
    preprocessing: Preprocessing | None
    has_original: bool
    trusted: bool = False

    def identity(self) -> str:
        """Return a hash that tells this model from others, by recipe and weights."""
        weights = sha256(self.directory / f"model{SUFFIX[self.recipe.framework]}")
        return hashlib.sha256(json.dumps([self.recipe.to_dict(), weights]).encode()).hexdigest()

    def original(self) -> Any:
        """Return the model as it was before the patch; raises `InputError` if the bundle was saved without it."""
        if not self.has_original:
            raise InputError(
                f"expected a bundle saved with its original, received {self.directory}; make it with `normswap patch`"
            )
        weights = self.directory / f"original{SUFFIX[self.recipe.framework]}"
        if self.recipe.framework == "keras":
            return _load_keras(weights, self.source, self.preprocessing)[0]
        return _load_torch(_build(self.directory, self.source, trust=self.trusted), weights)


def save(
    patched: Patched,
    directory: str | Path,
    *,
    source: str | None = None,
    original: Any = None,
    preprocessing: Preprocessing | None = None,
    overwrite: bool = False,
) -> None:
    """Write a patched model (a report or bundle) as a bundle.

    ``source`` says where the architecture comes from (see `normswap.sources.models`); without it a torch bundle
    can only be loaded into a model given to `load`. ``original`` is the model before the patch, which distillation
    learns from.

    Raises `OutputExistsError` if ``directory`` exists, unless it is a bundle and may be overwritten.
    """
    directory = Path(directory)
    require_replaceable(directory, overwrite=overwrite)
    framework = framework_of(patched.model)
    with staged(directory, overwrite=overwrite, kind=BUNDLE) as temporary:
        temporary.mkdir()
        write_weights(patched.model, temporary / f"model{SUFFIX[framework]}")
        if original is not None:
            write_weights(original, temporary / f"original{SUFFIX[framework]}")
        (temporary / MANIFEST).write_text(_manifest_of(patched, temporary, directory, source, preprocessing))


def save_into(bundle: Bundle, directory: Path) -> None:
    """Write the bundle's model and its original as a bundle among what else is in ``directory``.

    Files of an older bundle there are replaced one by one, the manifest last; what it had besides is removed.
    """
    framework = bundle.recipe.framework
    with staged(directory / MANIFEST, overwrite=True) as manifest:
        write_weights(bundle.model, manifest.with_name(f"model{SUFFIX[framework]}"))
        if bundle.has_original:
            original = f"original{SUFFIX[framework]}"
            shutil.copy2(bundle.directory / original, manifest.with_name(original))
        text = _manifest_of(bundle, manifest.parent, directory, bundle.source, bundle.preprocessing)
        manifest.write_text(text)
        written = {file.name for file in manifest.parent.iterdir()}
    for name in (f"{which}{suffix}" for which in ("model", "original") for suffix in SUFFIX.values()):
        if name not in written:
            (directory / name).unlink(missing_ok=True)


def _manifest_of(
    patched: Patched, folder: Path, directory: Path, source: str | None, preprocessing: Preprocessing | None
) -> str:
    """Return the manifest of the weights in ``folder``, which are to lie in ``directory``."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "normswap": __version__,
        "framework": framework_of(patched.model),
        "source": None if source is None else relative_spec(source, directory),
        "recipe": patched.recipe.to_dict(),
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "sha256": {file.name: sha256(file) for file in sorted(folder.iterdir())},
    }
    return json.dumps(manifest, indent=2) + "\n"


def load(directory: str | Path, *, model: Any = None, trust: bool = False) -> Any:
    """Return the patched model in a bundle.

    A torch bundle's architecture is built by running the code its source names, or is taken from ``model``, a
    fresh unpatched copy; so is a Keras bundle's if Keras does not know its classes.
    Where the source is a ``.pt2`` file, which can run code while it is read, ``trust`` says that it may.

    Raises `InputError` if the folder is not a bundle, is damaged, is not trusted, or does not fit.
    """
    return read(directory, model=model, trust=trust).model


def read(directory: str | Path, *, model: Any = None, trust: bool = False) -> Bundle:
    """Return everything in a bundle; see `load`."""
    directory = Path(directory)
    manifest = _manifest(directory)
    framework = manifest["framework"]
    recipe = Recipe.from_dict(manifest["recipe"])
    source = None if manifest["source"] is None else absolute_spec(manifest["source"], directory)
    settings = manifest.get("preprocessing")
    preprocessing = None if settings is None else Preprocessing.from_dict(settings)
    weights = directory / f"model{SUFFIX[framework]}"
    adapter = import_module(f".{framework}", __package__)
    if framework == "keras":
        model, recipe = _load_keras(weights, source, preprocessing, model, recipe)
    else:
        model = _build(directory, source, trust=trust) if model is None else as_module(model)
        adapter.patch(model, recipe)
        model = _load_torch(model, weights)
    return Bundle(
        directory=directory,
        model=model,
        recipe=recipe,
        source=source,
        preprocessing=preprocessing,
        has_original=f"original{SUFFIX[framework]}" in manifest["sha256"],
        trusted=trust,
    )


def load_weights(bundle: Bundle, path: Path) -> None:
    """Give the bundle's model the weights in ``path``, a file that a bundle of the same recipe holds."""
    if bundle.recipe.framework == "keras":
        load_keras_weights(bundle.model, path)
    else:
        _load_torch(bundle.model, path)


def require_replaceable(directory: Path, *, overwrite: bool) -> None:
    """Raise `OutputExistsError` if ``directory`` exists, unless it is a `BUNDLE` and may be overwritten."""
    if not overwrite and is_unfinished(directory):
        raise OutputExistsError(
            f"expected an output path that does not exist, received {directory} with a fine-tuning run that has not "
            "ended; add --resume to go on with it, or --overwrite"
        )
    require_output(directory, overwrite=overwrite, kind=BUNDLE)


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


def _manifest(directory: Path) -> dict[str, Any]:
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
            advice = "make one with `normswap patch`"
            if is_unfinished(directory):
                received, advice = "a fine-tuning run that has not ended", "repeat its command with --resume"
            raise InputError(f"expected a bundle in {directory}, received {received}; {advice}") from None
        raise InputError(f"expected a bundle in {directory}, received a folder without one: {error}") from None
    for name, digest in hashes.items():
        file = directory / Path(name).name
        if not file.is_file() or sha256(file) != digest:
            raise InputError(f"expected {file} as it was saved, received a file that is missing or has changed")
    return manifest  # type: ignore[no-any-return]


def _build(directory: Path, source: str | None, *, trust: bool) -> Any:
    if source is None:
        raise InputError(
            f"expected a bundle that says where its architecture comes from, received {directory} without; "
            "pass a fresh model to load(directory, model=...)"
        )
    return load_model(source, pretrained=False, trust=trust)


def write_weights(model: Any, path: Path) -> None:
    """Write the weights of a bundle's model to ``path``, which ends in its framework's suffix."""
    if framework_of(model) == "keras":
        model.save(path)
    else:
        import_module("..sources.weights", __package__).write_state_dict(model, path)


def _load_keras(
    path: Path, source: str | None, preprocessing: Preprocessing | None, model: Any = None, recipe: Recipe | None = None
) -> tuple[Any, Any]:
    """Return the model in a Keras file, which tells its architecture unless its classes are known to code alone.

    Then it is built as a torch model is: by the source's code or given as ``model``, and patched by ``recipe``, which
    is returned with this model's names.
    """
    adapter = import_module(".keras", __package__)
    if model is None:
        try:
            model = load_model(str(path))
        except InputError:
            if source is None:
                raise
            model = load_model(source, pretrained=False)
        else:
            if recipe is not None:
                adapter.mark(model, recipe)
            return model, recipe
    if preprocessing is not None and not model.built:
        model(example_input(model, preprocessing.shape), training=False)
    if recipe is not None:
        recipe = adapter.patch(model, recipe).recipe
    load_keras_weights(model, path)
    return model, recipe


def _load_torch(model: Any, path: Path) -> Any:
    weights = import_module("..sources.weights", __package__)
    weights.load_state_dict(model, weights.read_state_dict(path), str(path))
    return model.eval()
