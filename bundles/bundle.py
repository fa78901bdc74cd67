"""A bundle: a folder that holds a patched model, how it was made, and the original it was made from."""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..convert.recipe import Recipe
from ..convert.targets import SwitchNorm
from ..data.preprocessing import Preprocessing
from ..errors import InputError, option, spoken
from ..frameworks.detect import framework_of, get_framework
from ..patchers.patch import as_module
from ..patchers.plan import Report
from ..patchers.way_back import replay
from ..sources.files import sha256
from ..sources.outputs import is_stage, staged
from ..sources.spec import absolute_spec, runs_code
from ..sources.weights import SUFFIX, load_weights, write_weights
from .manifest import BUNDLE, MANIFEST, Drifts, is_empty, local, manifest_of, read_manifest, require_replaceable
from .source import load_model
from .trust import Trust, is_trusted, require_trusted, trust_in
from .written import remember

MEMORY = "_normswap_bundle"
"""Attribute of a loaded model that holds the bundle it came from, for it to be saved again."""


class Patched(Protocol):
    """A patched model with the recipe that made it, such as a `Report` or a `Bundle`."""

    @property
    def model(self) -> Any:
        """The patched model."""

    @property
    def recipe(self) -> Recipe:
        """What it was made by."""


_PATCH_AGAIN = "patch the model with its BatchNorms' weights"


@dataclass
class Bundle:
    """What a bundle's folder holds, the model loaded; ``name`` is what people call it, where that is not the folder."""

    directory: Path
    model: Any
    recipe: Recipe
    source: str | None
    preprocessing: Preprocessing | None
    has_original: bool
    trust: Trust = field(default_factory=Trust)
    drift: Drifts = field(default_factory=Drifts)
    name: str = ""

    def __str__(self) -> str:
        return self.name or str(self.directory)

    def identity(self) -> str:
        """Return a hash that tells this model from others, by recipe and weights."""
        weights = sha256(self.directory / f"model{SUFFIX[self.recipe.framework]}")
        return hashlib.sha256(json.dumps([self.recipe.to_dict(), weights]).encode()).hexdigest()

    def original(self) -> Any:
        """Return the model as it was before the patch; raises `InputError` if the bundle was saved without it."""
        if not self.has_original:
            raise InputError(
                f"expected a bundle saved with its original, received {self} without; "
                f"{spoken(_PATCH_AGAIN, 'pass original= to `normswap.save`')}"
            )
        if self.recipe.framework == "keras":
            return _load_keras(self, self.original_weights)[0]
        return _filled(_build(self), self.original_weights)

    @property
    def original_weights(self) -> Path:
        """The file with the weights from before the patch, where there is one."""
        return self.directory / f"original{SUFFIX[self.recipe.framework]}"


@dataclass
class Unpatched(Bundle):
    """A model as it is, to be trained and saved as that of a bundle; see `unpatched`."""

    def identity(self) -> str:
        """Return a hash that tells this model from others, by its weights."""
        framework = get_framework(self.model)
        keras = self.recipe.framework == "keras"
        weights = self.model.get_weights() if keras else map(framework.to_numpy, self.model.state_dict().values())
        found = hashlib.sha256()
        for each in weights:
            array = np.ascontiguousarray(each)
            found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        return found.hexdigest()

    def original(self) -> Any:
        """Raise `InputError`: there is none."""
        raise InputError(
            f"expected a patched model for its original, received {self.directory}, which no patch made; "
            f"learn from labels: {option('teacher', 'none')}"
        )


def unpatched(model: Any, source: str | None = None, preprocessing: Preprocessing | None = None) -> Bundle:
    """Return a model with the norms it was built with as what can be trained and saved as a bundle.

    ``source`` says where its architecture comes from, as `load_model` takes it; without it a torch model can only be
    loaded again into one given to `load`. ``preprocessing`` says how images become its input.
    """
    recipe = Recipe(framework_of(model), ())
    own = Trust(own=True)
    return Unpatched(Path(source or "model"), model, recipe, source, preprocessing, has_original=False, trust=own)


def save(
    patched: Any,
    directory: str | Path,
    *,
    source: str | None = None,
    original: Any = None,
    preprocessing: Preprocessing | None = None,
    overwrite: bool = False,
) -> None:
    """Write a patched model as a bundle: a report of `patch`, a `Bundle`, or a model that `load` returned.

    What comes from a bundle keeps that bundle's source, original and preprocessing where they are None. The ``source``
    given is the caller's own code, which `load` runs without asking while the bundle is as it was written.

    Args:
        patched: What `patch` or `load` returned.
        directory: Folder to write.
        source: Where the architecture comes from, as `load_model` takes it; without it a torch bundle can only be
            loaded into a model given to `load`.
        original: The model before the patch, which distillation learns from.
        preprocessing: How images become the model's input, for the command line.
        overwrite: Replace a bundle that is there.

    Raises:
        OutputExistsError: If ``directory`` exists, unless it is a bundle and may be overwritten.
        InputError: For a model of another kind, and if the bundle it came from has lost its original since.

    Example:
        >>> import normswap, torch
        >>> build = lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> report = normswap.patch(build(), "gn")
        >>> normswap.save(report, "net-gn")
        >>> model = normswap.load("net-gn", model=build())
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.equal(model(x), report.model(x))
        True
    """
    directory = Path(directory)
    require_replaceable(directory, overwrite=overwrite)
    known = _patched(patched)
    before = known if isinstance(known, Bundle) else None
    loaded = getattr(known.model, "__dict__", {}).get(MEMORY)
    if before is None and isinstance(loaded, Bundle):  # patched once more since it was loaded
        drift = _drift_of(known).after(loaded.drift)
        before = replace(loaded, model=known.model, recipe=known.recipe.after(loaded.recipe), drift=drift)
        known = before
    own = source is not None
    if before is not None:
        own = own or before.trust.own
        source, preprocessing = source or before.source, preprocessing or before.preprocessing
    write(known, directory, source, original, preprocessing, own=own, overwrite=overwrite)


def write(
    known: Patched,
    directory: Path,
    source: str | None,
    original: Any,
    preprocessing: Preprocessing | None,
    *,
    own: bool,
    overwrite: bool,
    drift: Drifts | None = None,
) -> None:
    """Write a bundle as `save` does; ``own`` says that its source is the user's own code, which is remembered.

    ``drift`` is what is known of it, where that is more than what the patch expected.
    """
    before = known if isinstance(known, Bundle) else None
    suffix = SUFFIX[known.recipe.framework]
    with _written(directory, overwrite=overwrite) as (temporary, _):
        write_weights(known.model, temporary / f"model{suffix}")
        if original is not None:
            write_weights(original, temporary / f"original{suffix}")
        elif before is not None and before.has_original:
            if not before.original_weights.is_file():
                raise InputError(
                    f"expected the original of the bundle the model came from at {before.original_weights}, received "
                    "nothing there; pass original="
                )
            shutil.copy2(before.original_weights, temporary / f"original{suffix}")
        _tell(known, temporary, directory, source, preprocessing, drift)
    _remember(directory, source, own=own)


def _tell(
    known: Patched,
    folder: Path,
    directory: Path,
    source: str | None,
    preprocessing: Preprocessing | None,
    drift: Drifts | None = None,
) -> None:
    """Write the manifest of a model and the weights in ``folder``, which are to lie in ``directory``."""
    recipe = _as_it_is(known.recipe, known.model)
    drift = _drift_of(known) if drift is None else drift
    manifest = manifest_of(folder, directory, recipe, source, preprocessing, drift)
    (folder / MANIFEST).write_text(manifest, encoding="utf-8")


def _drift_of(known: Patched) -> Drifts:
    """Return what a bundle tells of its drift, or what a patch expected of the layers it replaced."""
    if isinstance(known, Bundle):
        return known.drift
    replaced = known.plan.having("replace") if isinstance(known, Report) else []
    return Drifts.of({decision.site.name: decision.drift for decision in replaced})


def _remember(directory: Path, source: str | None, *, own: bool) -> None:
    """Have the bundle in ``directory``, just written, load without asking if its source is the user's own code."""
    if own and source is not None and runs_code(source):
        remember(directory, absolute_spec(source, Path.cwd()))


@contextmanager
def _written(directory: Path, *, overwrite: bool) -> Iterator[tuple[Path, bool]]:
    """Yield the folder in which a bundle's files are made, and whether it takes the place of ``directory`` at the end.

    Where a file system is mounted at ``directory`` itself, which cannot change its place, files move into it one by
    one, the manifest last, and what is not replaced stays.
    """
    if os.path.ismount(directory):
        require_replaceable(directory, overwrite=overwrite or is_empty(directory))
        with staged(directory / MANIFEST, overwrite=True) as manifest:
            yield manifest.parent, False
        return
    with staged(directory, overwrite=overwrite, kind=BUNDLE) as temporary:
        temporary.mkdir()
        yield temporary, True


def _as_it_is(recipe: Recipe, model: Any) -> Recipe:
    """Return the recipe with the formulas that the layers have taken over with weights loaded since."""
    if recipe.framework != "torch":  # a Keras file tells its layers' settings itself
        return recipe
    layers = dict(get_framework(model).named_layers(model))
    choices = [
        replace(choice, target=replace(choice.target, compat=layers[choice.name].compat))
        if isinstance(choice.target, SwitchNorm) and choice.name in layers
        else choice
        for choice in recipe.choices
    ]
    return replace(recipe, choices=tuple(choices))


def _patched(patched: Any) -> Patched:
    """Return what has model and recipe, for what `save` takes."""
    if hasattr(patched, "model") and isinstance(getattr(patched, "recipe", None), Recipe):
        return patched  # type: ignore[no-any-return]
    bundle = getattr(patched, "__dict__", {}).get(MEMORY)
    if not isinstance(bundle, Bundle):
        raise InputError(
            "expected a report of `patch`, a bundle, or a model that `load` returned, "
            f"received {type(patched).__name__}: save what `patch` returned"
        )
    return replace(bundle, model=patched)


def save_into(bundle: Bundle, directory: Path, *, without: Collection[str] = ()) -> None:
    """Write the bundle's model and its original as a bundle with what else is in ``directory``, such as its run.

    What is called as one of ``without`` does not stay.
    """
    framework = bundle.recipe.framework
    weights = {f"{which}{suffix}" for which in ("model", "original") for suffix in SUFFIX.values()}
    with _written(directory, overwrite=True) as (temporary, replaces):
        write_weights(bundle.model, temporary / f"model{SUFFIX[framework]}")
        if bundle.has_original:
            shutil.copy2(bundle.original_weights, temporary / bundle.original_weights.name)
        _tell(bundle, temporary, directory, bundle.source, bundle.preprocessing)
        written = {file.name for file in temporary.iterdir()}
        if replaces:
            _link(directory, temporary, without={*weights, MANIFEST, *without})
    for name in weights - written:
        (directory / name).unlink(missing_ok=True)
    _remember(directory, bundle.source, own=bundle.trust.own)


def _link(folder: Path, into: Path, *, without: Collection[str]) -> None:
    """Have all there is in a folder in another one, too: the same files under a second name."""
    for entry in folder.iterdir():
        if entry.name in without or is_stage(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, into / entry.name, symlinks=True, copy_function=_second_name)
        else:
            _second_name(entry, into / entry.name)


def _second_name(file: str | Path, name: str | Path) -> None:
    try:
        os.link(file, name, follow_symlinks=False)
    except OSError:  # a file system without
        shutil.copy2(file, name, follow_symlinks=False)


def load(directory: str | Path, *, model: Any = None, trust: bool = False, trust_code: bool = False) -> Any:
    """Return the patched model in a bundle.

    What it returns can be trained, exported and saved again. A torch bundle's architecture is built by its source; so
    is a Keras bundle's if Keras does not know its classes. A source that is Python code is run if the bundle was
    written on this machine and is as it was, or is trusted.

    Args:
        directory: The bundle's folder, as `save` or ``normswap patch`` wrote it, or ``hf://OWNER/NAME[@REVISION]``, to
            which ``normswap push`` wrote it.
        model: A fresh unpatched copy of the architecture, in place of the bundle's source.
        trust: Allows a source that is a ``.pt2`` file, which can run code while it is read.
        trust_code: Allows a source that is Python code or a model of a hub, whoever wrote it.

    Raises:
        InputError: If the folder is not a bundle, is damaged, is not trusted, or does not fit, and if a hub does not
            give it.

    Example:
        >>> import normswap, torch
        >>> report = normswap.patch(torch.nn.Sequential(torch.nn.BatchNorm1d(8)).eval(), "sn")
        >>> normswap.save(report, "net-sn")
        >>> type(normswap.load("net-sn", model=torch.nn.Sequential(torch.nn.BatchNorm1d(8)))[0]).__name__
        'SwitchNorm1d'
    """
    bundle = read(directory, model=model, trust=trust, trust_code=trust_code)
    bundle.model.__dict__[MEMORY] = replace(bundle, model=None)
    return bundle.model


def read(directory: str | Path, *, model: Any = None, trust: bool = False, trust_code: bool = False) -> Bundle:
    """Return everything in a bundle; see `load`."""
    name, directory = str(directory), local(directory)
    manifest, recipe = read_manifest(directory)
    framework, preprocessing = manifest.framework, manifest.preprocessing
    source = None if manifest.source is None else absolute_spec(manifest.source, directory)
    weights = directory / f"model{SUFFIX[framework]}"
    bundle = Bundle(
        directory=directory,
        model=None,
        recipe=recipe,
        source=source,
        preprocessing=preprocessing,
        has_original=f"original{SUFFIX[framework]}" in manifest.sha256,
        trust=trust_in(directory, source, code=trust_code, program=trust),
        drift=manifest.drift,
        name=name,
    )
    if framework == "keras":
        bundle.model, bundle.recipe = _load_keras(bundle, weights, model, recipe)
    else:
        model = _build(bundle) if model is None else as_module(model)
        replay(model, recipe)
        bundle.model = _filled(model, weights)
    return bundle


def _build(bundle: Bundle) -> Any:
    """Return the model that a bundle's source builds; raises `InputError` if there is none or it is not trusted."""
    if bundle.source is None:
        raise InputError(
            f"expected a bundle that says where its architecture comes from, received {bundle} without; "
            f"{spoken('save it with source=', 'pass a fresh model to load(directory, model=...)')}"
        )
    require_trusted(bundle.source, str(bundle), bundle.trust)
    return load_model(bundle.source, pretrained=False, trust=bundle.trust.program)


def _load_keras(bundle: Bundle, path: Path, model: Any = None, recipe: Recipe | None = None) -> tuple[Any, Any]:
    """Return the model in a Keras file of a bundle, which tells its architecture if Keras knows its classes.

    Else it is built as a torch model is: by the source's code or given as ``model``, and patched by ``recipe``, which
    is returned with this model's names.
    """
    source, preprocessing = bundle.source, bundle.preprocessing
    if model is None:
        from ..sources.keras.model_file import RefusedByKerasError, read_model, registered_by

        try:
            with registered_by(source if source and is_trusted(source, bundle.trust) else None):
                model = read_model(path)
        except RefusedByKerasError:
            if source is None:
                raise
            model = _build(bundle)
        else:
            if recipe is not None:
                from ..patchers.keras.saving import mark

                recipe = mark(model, recipe)
            return model, recipe
    if preprocessing is not None and not model.built:
        model(get_framework(model).zeros(model, preprocessing.shape), training=False)
    if recipe is not None:
        recipe = replay(model, recipe)
    load_weights(model, path)
    return model, recipe


def _filled(model: Any, path: Path) -> Any:
    load_weights(model, path)
    return model.eval()
