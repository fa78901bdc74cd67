"""How far a patched model is from the original on an example: each replaced layer's output and the model's."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..frameworks.detect import framework_of

See = Callable[[str, NDArray[Any]], None]
Run = Callable[[Collection[str], See], dict[str, NDArray[Any]]]

HELD = 2**28
"""Bytes of the original's outputs held at a time; one layer's if that is more."""


@dataclass(frozen=True)
class Drift:
    r"""How far one output is from the original's: :math:`\lVert y'-y \rVert / \lVert y \rVert`, max|y'-y| / max|y|.

    Both are None where the two differ in shape or are not finite, or where the original's is 0 throughout and the other
    is not.
    """

    name: str
    rms: float | None
    max: float | None


class Probe(Protocol):
    """What a framework's adapter does for a measurement."""

    def watch(self, model: Any, example: Any, names: Collection[str], see: See) -> dict[str, NDArray[Any]]:
        """Run ``model`` on an example at inference; tell ``see(name, output)`` of each call of the named layers.

        Returns the model's outputs, named as `outputs_of` does.
        """

    def as_original(self, swaps: Sequence[Any]) -> AbstractContextManager[None]:
        """Have each replacement compute within the context what its BatchNorm did."""


def drift_from_original(probe: Probe, model: Any, swaps: Sequence[Any], example: Any) -> list[Drift]:
    """Return how far ``model`` is from what it computed before ``swaps``, which stay as they are."""
    run = _run(probe, model, example)

    def original(names: Collection[str], see: See) -> dict[str, NDArray[Any]]:
        with probe.as_original(swaps):
            return run(names, see)

    return _compare(original, run, [swap.name for swap in swaps])


def drift_between(model: Any, reference: Any, names: Sequence[str], example: Any) -> list[Drift]:
    """Return how far ``model`` is from ``reference``, the model before the patch, at the named layers and the end."""
    probe: Any = import_module(f".{framework_of(model)}.drift", __package__)
    return _compare(_run(probe, reference, example), _run(probe, model, example), names)


def outputs_of(value: Any, name: str = "output") -> Iterator[tuple[str, Any]]:
    """Yield what a model returned, tensor by tensor: ``output``, or ``output[0]``, ``output[key]`` of several."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from outputs_of(item, f"{name}[{key}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from outputs_of(item, name if len(value) == 1 else f"{name}[{index}]")
    elif hasattr(value, "dtype"):
        yield name, value


def _run(probe: Probe, model: Any, example: Any) -> Run:
    def run(names: Collection[str], see: See) -> dict[str, NDArray[Any]]:
        try:
            return probe.watch(model, example, names, see)
        except Exception as error:
            message = f"expected an example the model accepts, received one on which it fails: {error}"
            raise InputError(message) from error

    return run


def _compare(original: Run, patched: Run, names: Sequence[str]) -> list[Drift]:
    """Run both, the original's outputs held until the other's come, in as many rounds as `HELD` asks for.

    Layers come in the order of their calls, those that are not called not at all, and the model's outputs last.
    """
    left = set(names)
    found: dict[str, _Distance] = {}
    while True:
        round_ = _Round(left, found)
        wanted = original(left, round_.keep)
        outputs = patched(round_.held.keys(), round_.compare)
        left -= round_.held.keys()
        if not left or not round_.held:
            break
    ends = {name: _Distance() for name in wanted}
    for name, end in ends.items():
        end.add(wanted[name], outputs[name])
    return [distance.drift(name) for name, distance in (*found.items(), *ends.items())]


class _Round:
    """What of the original's layers is held at a time, to be compared."""

    def __init__(self, left: Collection[str], found: dict[str, "_Distance"]) -> None:
        self.left, self.found, self.room = left, found, HELD
        self.held: dict[str, list[NDArray[Any]]] = {}

    def keep(self, name: str, y: NDArray[Any]) -> None:
        """Hold what one call of a layer gave, if there is room or it is the layer's next call."""
        if self.room > 0 or name in self.held:
            self.held.setdefault(name, []).append(y)
            self.room -= y.nbytes

    def compare(self, name: str, y: NDArray[Any]) -> None:
        """Compare what the same call gave in the patched model."""
        self.found.setdefault(name, _Distance()).add(self.held[name].pop(0), y)


class _Distance:
    """The distance of outputs from the original's, summed over calls."""

    def __init__(self) -> None:
        self.squares = np.zeros(2)
        self.largest = np.zeros(2)
        self.alike = True

    def add(self, original: NDArray[Any], patched: NDArray[Any]) -> None:
        if original.shape != patched.shape:
            self.alike = False
        elif original.size:
            with np.errstate(invalid="ignore"):  # infinities, whose difference is no number
                pair = (patched.astype(np.float64) - original, original.astype(np.float64))
            self.squares += [np.sum(np.square(values)) for values in pair]
            self.largest = np.maximum(self.largest, [np.abs(values).max() for values in pair])

    def drift(self, name: str) -> Drift:
        if not self.alike or not np.isfinite(self.largest).all():
            return Drift(name, None, None)
        return Drift(name, _share(*np.sqrt(self.squares)), _share(*self.largest))


def _share(distance: float, scale: float) -> float | None:
    return float(distance / scale) if scale > 0 else None if distance > 0 else 0.0
