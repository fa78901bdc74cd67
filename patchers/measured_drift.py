"""How far a patched model is from the original on an example: each replaced layer's output and the model's."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import said
from ..frameworks.detect import get_framework
from ..frameworks.example import not_taken
from .contract import patcher_of

See = Callable[[str, NDArray[Any]], None]
Run = Callable[[Collection[str], See], dict[str, NDArray[Any]]]

HELD = 2**28
"""Bytes of the original's outputs held at a time; one layer's if that is more."""


@dataclass(frozen=True)
class Drift:
    r"""How far one output is from the original's: :math:`\lVert y'-y \rVert / \lVert y \rVert`, max|y'-y| / max|y|.

    Both are None where the two differ in shape, in number (of a layer's calls, or a model's outputs) or are not finite,
    or where the original's is 0 throughout and the other is not.
    """

    name: str
    rms: float | None
    max: float | None


class Swapped(Protocol):
    """A replacement in place, which can compute what its BatchNorm did."""

    name: str
    compared: bool
    """Whether its output is that of a layer of the original; else it only changes weights."""

    def as_original(self) -> AbstractContextManager[None]:
        """Have the replacement compute within the context what its BatchNorm did, and nothing else changed."""


def drift_from_original(model: Any, swaps: Sequence[Swapped], example: Any) -> list[Drift]:
    """Return how far ``model`` is from what it computed before ``swaps``, which stay as they are."""
    run = _run(model, example)

    def original(names: Collection[str], see: See) -> dict[str, NDArray[Any]]:
        with ExitStack() as stack:
            for swap in swaps:
                stack.enter_context(swap.as_original())
            return run(names, see)

    return _compare(original, run, [swap.name for swap in swaps if swap.compared])


def drift_between(model: Any, reference: Any, names: Sequence[str], example: Any) -> list[Drift]:
    """Return how far ``model`` is from ``reference``, the model before the patch, at the named layers and the end."""
    return _compare(_run(reference, example), _run(model, example), names)


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


def _run(model: Any, example: Any) -> Run:
    framework, patcher = get_framework(model), patcher_of(model)

    def run(names: Collection[str], see: See) -> dict[str, NDArray[Any]]:
        def note(name: str, x: Any, y: Any) -> None:
            see(name, framework.to_numpy(y))

        try:
            with (
                patcher.layers_by_name(model) as layers,
                framework.inference(model, compiled=False),
                framework.watching({name: layers[name] for name in names}, note),
            ):
                outputs = dict(outputs_of(framework.call(model, example)))
                return {name: framework.to_numpy(y) for name, y in outputs.items()}
        except Exception as error:
            raise not_taken(said(error)) from error

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
        round_.end()
        left -= round_.held.keys()
        if not left or not round_.held:
            break
    ends = {name: _Distance() for name in wanted | outputs}
    for name, end in ends.items():
        end.add(wanted.get(name), outputs.get(name))
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
            self.found.setdefault(name, _Distance())
            self.room -= y.nbytes

    def compare(self, name: str, y: NDArray[Any]) -> None:
        """Compare what the same call gave in the patched model."""
        held = self.held[name]
        self.found[name].add(held.pop(0) if held else None, y)

    def end(self) -> None:
        """Count the calls that the patched model did not make."""
        for name, held in self.held.items():
            for y in held:
                self.found[name].add(y, None)


class _Distance:
    """The distance of outputs from the original's, summed over calls."""

    def __init__(self) -> None:
        self.squares = np.zeros(2)
        self.largest = np.zeros(2)
        self.alike = True

    def add(self, original: NDArray[Any] | None, patched: NDArray[Any] | None) -> None:
        """Count what both gave; None stands for what one of them did not give."""
        if original is None or patched is None or original.shape != patched.shape:
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
