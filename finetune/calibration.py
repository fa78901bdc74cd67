"""Calibration: re-solve each replacement's scale and shift on unlabelled inputs, layer by layer."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, UnsupportedError
from ..sources.framework import framework_of

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Residual:
    """How far one layer's output was from the original's, before and after, as a share of its deviation."""

    name: str
    before: float
    after: float


class Moments:
    """Mean and variance per channel of a stream of arrays (..., C), in float64 (Chan et al., 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Array = np.zeros(0)
        self._sum_of_squares: Array = np.zeros(0)

    def add(self, values: NDArray[Any]) -> None:
        """Take in one array with the channels last."""
        rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
        mean = rows.mean(axis=0)
        squares = np.square(rows - mean).sum(axis=0)
        if self.count == 0:
            self.count, self.mean, self._sum_of_squares = len(rows), mean, squares
            return
        total = self.count + len(rows)
        difference = mean - self.mean
        self._sum_of_squares = self._sum_of_squares + squares + difference**2 * (self.count * len(rows) / total)
        self.mean = self.mean + difference * (len(rows) / total)
        self.count = total

    @property
    def deviation(self) -> Array:
        """The standard deviation per channel."""
        return np.sqrt(self._sum_of_squares / self.count)


def calibrate(model: Any, reference: Any, batches: Iterable[Any]) -> list[Residual]:
    r"""Give each replaced layer the scale and shift that reproduce the original's moments on ``batches``.

    In call order, with everything before it calibrated already, a layer that normalizes to :math:`\hat x` gets

    .. math:: \gamma' = \mathrm{sign}(\gamma)\,\mathrm{std}(y)/\mathrm{std}(\hat x), \qquad
              \beta' = \mathrm{mean}(y) - \gamma'\,\mathrm{mean}(\hat x)

    per channel, where y is what the same layer of ``reference``, the model before the patch, returns. A channel
    with γ = 0 keeps it. ``batches`` are inputs as the model takes them, without labels; a few hundred samples do.
    A layer that is called several times is solved for all its calls together. Returns the residual of each layer.

    Raises `UnsupportedError` if the model has no replaced layers, `InputError` if the inputs are constant or none.
    """
    adapter: ModuleType = import_module(f".{framework_of(model)}_sites", __package__)
    held = list(batches)
    if not held:
        raise InputError("expected inputs to calibrate on, received none")
    layers: Mapping[str, Any] = adapter.site_layers(model)
    if not layers:
        raise UnsupportedError("expected a patched model to calibrate, received one without replaced layers")
    calls = _calls(adapter, model, list(layers), held[0])
    wanted = _moments(adapter, reference, list(calls), held)
    return [
        _solve(adapter, model, layers[name], name, wanted[name], held, once=count == 1) for name, count in calls.items()
    ]


def _solve(
    adapter: ModuleType, model: Any, layer: Any, name: str, wanted: Moments, batches: list[Any], *, once: bool
) -> Residual:
    gamma, beta = adapter.get_affine(layer)
    adapter.set_affine(layer, np.ones_like(gamma), np.zeros_like(beta))
    try:
        plain = _moments(adapter, model, [name], batches, stop=once)[name]
    finally:
        adapter.set_affine(layer, gamma, beta)
    constant = plain.deviation == 0
    if constant.all():
        raise InputError(f"expected inputs that differ, received batches on which {name} is constant")
    alive = (gamma != 0) & ~constant
    safe = np.where(alive, plain.deviation, 1.0)
    new_gamma = np.where(alive, np.sign(gamma) * wanted.deviation / safe, gamma)
    new_beta = wanted.mean - new_gamma * plain.mean
    adapter.set_affine(layer, new_gamma, new_beta)
    before = _residual(wanted, gamma * plain.mean + beta, np.abs(gamma) * plain.deviation)
    after = _residual(wanted, new_gamma * plain.mean + new_beta, np.abs(new_gamma) * plain.deviation)
    return Residual(name, before, after)


def _calls(adapter: ModuleType, model: Any, names: list[str], batch: Any) -> Counter[str]:
    """Return how often each layer is called on one batch, in the order of the first calls."""
    calls: Counter[str] = Counter()

    def see(name: str, output: NDArray[Any]) -> bool:
        calls[name] += 1
        return False

    adapter.observe(model, names, batch, see)
    return calls


def _moments(
    adapter: ModuleType, model: Any, names: list[str], batches: list[Any], *, stop: bool = False
) -> dict[str, Moments]:
    """Return the moments of the named layers' outputs in call order; no output is held longer than it takes.

    ``stop`` ends each pass at the first call of the one layer named, which saves the rest of the network.
    """
    moments: dict[str, Moments] = {}
    for batch in batches:

        def see(name: str, output: NDArray[Any]) -> bool:
            moments.setdefault(name, Moments()).add(output)
            return stop

        adapter.observe(model, names, batch, see)
    return moments


def _residual(wanted: Moments, mean: Array, deviation: Array) -> float:
    """Root mean square over channels of the moments' distance, over the original's root mean square deviation."""
    distance = np.square(mean - wanted.mean) + np.square(deviation - wanted.deviation)
    scale = np.square(wanted.deviation).mean()
    return float(np.sqrt(distance.mean() / scale)) if scale > 0 else 0.0
