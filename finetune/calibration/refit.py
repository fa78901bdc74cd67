"""Refitting: the weights that take what reaches a layer now to what it returns in the original, all layers at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...convert.equalize import Equalized
from ...convert.state import Array
from ...frameworks.detect import get_framework
from ...frameworks.example import Inputs
from .contract import CalibrationLayers, Solvable
from .least_squares import LinearFit

ROUNDS = 3
"""How often all layers are refitted at most."""

GAIN = 0.03
"""The least share by which a round brings the output nearer that is worth another one."""

TRIED = ((0.1, 0.5), (1.0, 0.5), (1.0, 0.25))
"""Ridges, and how much of the way layers go, since the layers before go theirs as well: what helps most is kept."""

ROWS = 8192
"""How many outputs a layer is fitted to, positions of maps drawn from as many inputs as `INPUTS`."""

INPUTS = 256

WORTH = 0.35
"""The least distance of the outputs, as a share of the original's, that is worth the time."""

LINEAR = 0.01
"""How far from linear in its weights a layer may be, as a share of its output: more than bfloat16 rounds."""


MORE = "it computes something else than its weights times its input"
UNSEEN = "no call of it was seen in both models"


class Refitted:
    """One layer's change by refitting, which can be undone; a `Swap` as `patch` keeps them."""

    compared = False

    def __init__(self, adapter: CalibrationLayers, name: str, layer: Any, before: Array) -> None:
        self.adapter, self.name, self.layer, self.before = adapter, name, layer, before
        self.after = adapter.get_weights(layer)

    def apply(self) -> None:
        """Give the layer its refitted weights."""
        self.adapter.set_weights(self.layer, self.after)

    def restore(self) -> None:
        """Give the layer the weights it had before."""
        self.adapter.set_weights(self.layer, self.before)

    def trained(self) -> bool:
        """Return whether the layer has changed since."""
        return not np.array_equal(self.adapter.get_weights(self.layer), self.after)

    def accept(self, found: Any) -> None:
        """Take the weights of the present for the refitted ones."""
        self.after = self.adapter.get_weights(self.layer)

    @contextmanager
    def as_original(self) -> Iterator[None]:
        """Run the body with the weights from before."""
        self.restore()
        try:
            yield
        finally:
            self.apply()


def size_of(batch: Any) -> int:
    """Return the number of samples in a batch."""
    return next((int(array.shape[0]) for array in Inputs.of(batch).arrays.values() if len(array.shape)), 0)


def refitted(
    adapter: CalibrationLayers,
    model: Any,
    original: Any,
    layers: Mapping[str, Any],
    solved: Mapping[str, Equalized],
    solvable: Mapping[str, Solvable],
    batches: Sequence[Any],
    drift: Callable[[], float],
) -> tuple[list[Refitted], dict[str, str]]:
    """Refit ``layers`` of ``model`` as far as that brings it nearer to the ``original``.

    ``drift`` measures how far it is. Returns what has changed, and by name why layers were left, where any was tried.
    """
    before = {name: adapter.get_weights(layer) for name, layer in layers.items()}
    best, keep = drift(), get_framework(model).snapshot(model)
    fronts = {site.front_name: solved[name] for name, site in solvable.items() if site.front_name}
    left: dict[str, str] = {}
    for _ in range(ROUNDS if best > WORTH else 0):
        fits, others = _fits(adapter, model, original, layers, fronts, batches)
        start, left = best, {**adapter.left_layers(model), **others}
        for ridge, step in TRIED:
            for name, found in fits.items():
                adapter.set_weights(layers[name], found.solve(ridge, step))
            if (now := drift()) < best:
                best, keep = now, get_framework(model).snapshot(model)
        keep()
        if best > (1 - GAIN) * start:
            break
    changes = [Refitted(adapter, name, layer, before[name]) for name, layer in layers.items()]
    return [change for change in changes if not np.array_equal(change.before, change.after)], left


def _by_groups(front: Equalized, y: NDArray[Any]) -> NDArray[Any]:
    """Return outputs (G, M, O/G) of a layer in the original as the equalized one is to return them."""
    mean, factor, shift = (each.reshape(len(y), 1, -1) for each in (front.running_mean, front.factor, front.shift))
    found: NDArray[Any] = ((y - mean) * factor + shift).astype(y.dtype)
    return found


def _follows(y: NDArray[Any], linear: NDArray[Any]) -> bool:
    """Return whether a layer's outputs are what its weights make of its inputs, whatever its class, up to rounding."""
    return y.shape == linear.shape and bool(np.square(y - linear).mean() <= LINEAR**2 * np.square(y).mean())


def _fits(
    adapter: CalibrationLayers,
    model: Any,
    original: Any,
    layers: Mapping[str, Any],
    fronts: Mapping[str, Equalized],
    batches: Sequence[Any],
) -> tuple[dict[str, LinearFit], dict[str, str]]:
    """Return for each layer the fit of what the original's returns to what reaches it now, or why there is none."""
    framework = get_framework(model)
    known = dict(get_framework(original).named_layers(original))
    watched = {name: known[name] for name in layers if name in known}
    again = {name: layers[name] for name in watched}
    fits: dict[str, LinearFit | None] = {}  # None for a layer that computes something else
    unlike: set[str] = set()  # those whose class gives a call other weights
    wanted: dict[str, list[Any]] = {}
    seen = 0

    def note(name: str, x: Any, y: Any) -> None:
        wanted.setdefault(name, []).append(adapter.picked(known[name], y, ROWS // INPUTS))

    def fit(name: str, x: Any, y: Any) -> None:
        if not wanted.get(name):
            return
        target = wanted[name].pop(0)
        if name in fronts:
            target = _by_groups(fronts[name], target)
        if (rows := adapter.rows(layers[name], x, y, ROWS // INPUTS)) is None:
            unlike.add(name)
            return
        if name not in fits:
            weights = adapter.get_weights(layers[name])
            linear = _follows(adapter.picked(layers[name], y, ROWS // INPUTS), rows @ weights)
            fits[name] = LinearFit(weights) if linear else None
        if (found := fits[name]) is not None:
            found.add(rows, target)

    for batch in batches:
        wanted.clear()
        with framework.inference(original, compiled=False), framework.watching(watched, note, first=True):
            framework.call(original, batch)
        with framework.inference(model, compiled=False), framework.watching(again, fit, first=True):
            framework.call(model, batch)
        seen += size_of(batch)
        if seen >= INPUTS:
            break
    others = {name: MORE if name in fits.keys() | unlike else UNSEEN for name in layers if fits.get(name) is None}
    return {name: found for name, found in fits.items() if found is not None}, others
