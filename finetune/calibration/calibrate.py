"""Calibration: re-solve each replacement, and the weights behind it, on unlabelled inputs, layer by layer."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.dataset import Data
from ...errors import InputError, NormswapWarning, UnsupportedError, VerificationError
from ...frameworks.detect import get_framework
from .contract import CalibrationLayers, layers_of
from .least_squares import Array, LinearFit, Moments

See = Callable[[str, NDArray[Any], NDArray[Any]], object]


class _PassEnded(BaseException):
    """Raised to leave a forward pass once its last wanted layer has run; Keras rewraps every `Exception`."""


@dataclass(frozen=True)
class Residual:
    """How far one layer's output was from the original's, before and after, as a share of its deviation."""

    name: str
    before: float
    after: float


def calibrate(model: Any, reference: Any, batches: Iterable[Any], *, refit: bool = True) -> list[Residual]:
    r"""Bring ``model`` nearer to ``reference``, the model before the patch, on unlabelled ``batches``.

    Layer by layer in call order, with everything before it calibrated already, a replaced layer that normalizes to
    :math:`\hat x` gets, per channel,

    .. math:: \gamma' = \mathrm{sign}(\gamma)\,\mathrm{std}(y)/\mathrm{std}(\hat x), \qquad
              \beta' = \mathrm{mean}(y) - \gamma'\,\mathrm{mean}(\hat x)

    where y is what the same layer of ``reference`` returns; a channel with γ = 0 keeps it. A convolution or dense
    layer behind the first replaced one gets the weights :math:`W'` that take what reaches it now to what it returns
    in ``reference``, by least squares with a ridge towards its own: :math:`\min \sum \lVert y - W' x \rVert^2 +
    \lambda \lVert W' - W \rVert^2`. ``refit=False`` leaves those as they are, as frozen, shared, grouped and very
    wide ones always are. A layer that is called several times is solved for all its calls together.

    Sums are float64, and the outputs of one layer for one batch are all that is held.

    Args:
        model: The patched model, which is changed.
        reference: The model before the patch.
        batches: Inputs as the model takes them, without labels; a few hundred samples do. Each layer takes a pass over
            them: an iterator is held in memory, anything else is iterated over again and may be of any length.
        refit: False leaves convolutions and dense layers alone.

    Returns:
        The `Residual` of each layer: how far its output was from the original's, before and after.

    Raises:
        UnsupportedError: If the model has no replaced layers.
        InputError: If the inputs are none or not finite, or ``reference`` lacks a layer of the model.
        VerificationError: If the inputs are constant at a layer.

    Example:
        >>> import copy, normswap, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> original = copy.deepcopy(model)
        >>> report = normswap.patch(model, "gn")
        >>> residuals = normswap.calibrate(model, original, [torch.randn(16, 3, 8, 8)])
        >>> [(residual.name, residual.after < residual.before) for residual in residuals]
        [('1', True)]
    """
    adapter = layers_of(model)
    batches = list(batches) if isinstance(batches, Iterator) else batches
    first = next(iter(batches), None)
    if first is None:
        raise InputError("expected inputs to calibrate on, received none")
    sites = site_layers(model)
    if not sites:
        raise UnsupportedError("expected a patched model to calibrate, received one without replaced layers")
    linear: Mapping[str, Any] = adapter.linear_layers(model) if refit else {}
    calls = _calls(model, [*sites, *linear], first)
    known = dict(get_framework(reference).named_layers(reference))
    if missing := [name for name in calls if name not in known]:
        raise InputError(
            "expected a reference with the layers of the model, which it is before the patch, received one without "
            f"{', '.join(missing)}"
        )
    changed = False  # before the first replaced layer the models are the same
    residuals = []
    for name, count in calls.items():
        paired = _Paired(adapter, model, reference, batches, name, once=count == 1)
        if name in sites:
            residuals.append(_match(paired, sites[name]))
            changed = True
        elif changed:
            residuals.append(_refit(paired, linear[name]))
    return residuals


def site_layers(model: Any) -> Mapping[str, Any]:
    """Return the replaced layers that calibration solves by name: none that compute the original already."""
    return layers_of(model).site_layers(model)


def sample(data: Data, count: int) -> list[NDArray[np.float32]]:
    """Return ``count`` images drawn from ``data`` in batches of 64; warns if there are fewer."""
    if len(data) < count:
        warnings.warn(
            f"expected {count} images to calibrate on, received {len(data)}; see what the residuals say",
            NormswapWarning,
            stacklevel=2,
        )
    return [images for images, _ in data.batches(64, data.sample(count))]


def split(data: Data, count: int) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
    """Return what `sample` does, and other images to judge by what it brings: as many, or a quarter of all.

    Of fewer than four images they are the same. Warns if less than ``count`` are left to calibrate on.
    """
    others = min(count, len(data) // 4)
    taken = min(count, len(data) - others)
    if taken < count:
        warnings.warn(
            f"expected {count} images to calibrate on, received {taken} beside {others} to judge it by",
            NormswapWarning,
            stacklevel=2,
        )
    return sample(data, taken), data.batch(data.sample(len(data))[-others:])[0]


@dataclass(frozen=True)
class _Paired:
    """One layer's calls in both models, batch by batch."""

    adapter: CalibrationLayers
    model: Any
    reference: Any
    batches: Iterable[Any]
    name: str
    once: bool

    def __iter__(self) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """Yield the model's inputs and outputs and the original's outputs of each call, channels last."""
        for batch in self.batches:
            wanted = self._calls(self.reference, batch)
            for (inputs, outputs), (_, original) in zip(self._calls(self.model, batch), wanted, strict=True):
                yield inputs, outputs, original

    def _calls(self, model: Any, batch: Any) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        calls: list[tuple[NDArray[Any], NDArray[Any]]] = []

        def see(name: str, inputs: NDArray[Any], outputs: NDArray[Any]) -> bool:
            calls.append((inputs, outputs))
            return self.once  # spares the rest of the network

        observe(model, [self.name], batch, see)
        return calls


def _match(paired: _Paired, layer: Any) -> Residual:
    """Give a replaced layer the original's moments."""
    adapter = paired.adapter
    gamma, beta = adapter.get_affine(layer)
    plain, wanted = Moments(), Moments()
    adapter.set_affine(layer, np.ones_like(gamma), np.zeros_like(beta))
    try:
        for _, outputs, original in paired:
            plain.add(outputs)
            wanted.add(original)
    finally:
        adapter.set_affine(layer, gamma, beta)
    if not np.isfinite(plain.deviation + wanted.deviation).all():
        raise InputError(f"expected finite inputs and outputs, received batches on which {paired.name} has others")
    constant = plain.deviation == 0
    if constant.all():
        raise VerificationError(f"expected inputs that differ, received batches on which {paired.name} is constant")
    alive = (gamma != 0) & ~constant
    safe = np.where(alive, plain.deviation, 1.0)
    new_gamma = np.where(alive, np.sign(gamma) * wanted.deviation / safe, gamma)
    new_beta = wanted.mean - new_gamma * plain.mean
    adapter.set_affine(layer, new_gamma, new_beta)
    before = _distance(wanted, gamma * plain.mean + beta, np.abs(gamma) * plain.deviation)
    after = _distance(wanted, new_gamma * plain.mean + new_beta, np.abs(new_gamma) * plain.deviation)
    return Residual(paired.name, before, after)


def _refit(paired: _Paired, layer: Any) -> Residual:
    """Give a layer the weights that return what the original's does, from what reaches it now."""
    fit = LinearFit(paired.adapter.get_weights(layer))
    for inputs, _, original in paired:
        for x, y in zip(inputs, original, strict=True):  # a sample at a time, since patches overlap
            fit.add(paired.adapter.patches(layer, x), y.reshape(-1, y.shape[-1]))
    weights, before, after = fit.solve()
    paired.adapter.set_weights(layer, weights)
    return Residual(paired.name, before, after)


def observe(model: Any, names: Sequence[str], batch: Any, see: See) -> None:
    """Run ``model`` on one batch and tell ``see(name, input, output)`` of each call of the named layers.

    Channels come last, a linear layer's features as they are. If ``see`` returns True, the forward pass ends there.
    """
    framework, adapter = get_framework(model), layers_of(model)
    known = dict(framework.named_layers(model))

    def note(name: str, x: Any, y: Any) -> None:
        if see(name, *adapter.channels_last(known[name], x, y)):
            raise _PassEnded

    with (
        suppress(_PassEnded),
        framework.inference(model, compiled=False),
        framework.watching({name: known[name] for name in names}, note, first=True),
    ):
        framework.call(model, batch)


def _calls(model: Any, names: Sequence[str], batch: Any) -> Counter[str]:
    """Return how often each layer is called on one batch, in the order of the first calls."""
    calls: Counter[str] = Counter()
    observe(model, names, batch, lambda name, x, y: calls.update([name]))
    return calls


def _distance(wanted: Moments, mean: Array, deviation: Array) -> float:
    """Root mean square over channels of the moments' distance, over the original's root mean square deviation."""
    distance = np.square(mean - wanted.mean) + np.square(deviation - wanted.deviation)
    scale = np.square(wanted.deviation).mean()
    return float(np.sqrt(distance.mean() / scale)) if scale > 0 else 0.0
