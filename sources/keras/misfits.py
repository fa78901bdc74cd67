"""Which weights of a Keras model a file lacks, has of another shape, or has too many: all, where Keras tells of one.

Of layers in a file that the model lacks it tells nothing where the rest fits.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...frameworks.keras import distinct_layers, override


@dataclass
class Misfits:
    """What does not fit, a line for each weight, by its path in the model."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def compare(self, name: str, variables: list[Any], stored: dict[str, tuple[int, ...]]) -> None:
        """Note what does not fit of one layer, whose variables are stored by number."""
        for number, variable in enumerate(variables):
            shape, found = tuple(variable.shape), stored.get(str(number))
            if found is None:
                self.missing.append(variable.path)
            elif found != shape:
                self.shapes.append(f"{variable.path}: {shape} in the model, {found} in the file")
        count = len(variables)
        self.unexpected += [f"{name}, number {key}" for key in stored if not (key.isdecimal() and int(key) < count)]


_BESIDE = re.compile(r"(?:^|/)(?:optimizer|metrics|seed_generator)(?:_\d+)?(?:/|$)")
"""Where a file has what is no layer's: how training stood, and where random numbers go on."""


@contextmanager
def noting(model: Any) -> Iterator[Callable[[], Misfits]]:
    """Yield what tells the misfits of a file that Keras loads within the context, which asks layer by layer."""
    failed: dict[int, tuple[str, list[Any], dict[str, tuple[int, ...]]]] = {}
    unasked: dict[str, str] = {}

    def watch(store: Any) -> None:
        unasked.update(_layers_in(store.h5_file))
        get = store.get

        def asked(place: str) -> Any:
            for each in (place, place.replace("layers", "_layer_checkpoint_dependencies")):  # as Keras 2.13 wrote
                unasked.pop(each, None)
            return get(place)

        store.get = asked

    def spy(layer: Any, load: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def noted(store: Any) -> Any:
            if layer is model:  # the first that is asked
                watch(store)
            failed.pop(id(layer), None)  # which Keras tries twice
            try:
                return load(store)
            except Exception:
                variables = [*layer._trainable_variables, *layer._non_trainable_variables]
                failed[id(layer)] = layer.name, variables, {key: tuple(store[key].shape) for key in store.keys()}  # noqa: SIM118 - no dict
                raise

        return noted

    def told() -> Misfits:
        misfits = Misfits()
        for each in failed.values():
            misfits.compare(*each)
        misfits.unexpected += [unasked[place] for place in sorted(unasked, key=_counted)]
        return misfits

    with ExitStack() as stack:
        for layer in distinct_layers(model):
            stack.callback(override(layer, "load_own_variables", partial(spy, layer)))
        yield told


def _layers_in(file: Any) -> dict[str, str]:
    """Return what each layer with weights in a file of Keras 3 is called, by its place."""
    found: dict[str, str] = {}

    def see(name: str, member: Any) -> None:
        place, _, last = name.rpartition("/")
        if place and last == "vars" and hasattr(member, "keys") and len(member) and not _BESIDE.search(place):
            called = member.attrs.get("name")
            found[place] = place if called is None else f"{_text(called)} ({place})"

    file.visititems(see)
    return found


def _counted(place: str) -> list[tuple[int, str]]:
    """Return what has dense_2 before dense_10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", place)]


def of_legacy(model: Any, path: Path) -> Misfits:
    """Return what does not fit of HDF5 of Keras 2, whose layers with weights are taken in order; nothing of others."""
    import h5py

    misfits = Misfits()
    try:
        with h5py.File(path, "r") as file:
            group = file.get("model_weights", file)
            names = [_text(name) for name in group.attrs["layer_names"]]
            stored = [(name, _shapes(group[name])) for name in names]
    except (OSError, KeyError, RuntimeError):  # damaged, or of Keras 3
        return misfits
    saved = [(name, shapes) for name, shapes in stored if shapes]
    layers = [layer for layer in model.layers if layer.weights]
    for layer, (name, shapes) in zip(layers, saved, strict=False):
        variables = [*layer.trainable_weights, *layer.non_trainable_weights]
        misfits.compare(name, variables, {str(number): shape for number, shape in enumerate(shapes)})
    misfits.missing += [variable.path for layer in layers[len(saved) :] for variable in layer.weights]
    misfits.unexpected += [name for name, _ in saved[len(layers) :]]
    return misfits


def _shapes(group: Any) -> list[tuple[int, ...]]:
    return [tuple(group[_text(name)].shape) for name in group.attrs.get("weight_names", ())]


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
