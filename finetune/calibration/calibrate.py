"""Calibration: what the patch chose without data is chosen again on a few hundred unlabelled inputs."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...convert.equalize import Equalized, equalize, error_of, factor_since
from ...convert.samples import Samples, kept_aside
from ...data.dataset import Data
from ...data.named import NamedInputs
from ...errors import InputError, NormswapWarning, UnsupportedError, VerificationError, option, said
from ...frameworks import several
from ...frameworks.detect import get_framework
from ...frameworks.example import Inputs
from ...patchers.contract import patcher_of
from ...patchers.plan import Report
from .contract import CalibrationLayers, Solvable, layers_of
from .refit import Refitted, refitted, size_of

FEWEST = 16
"""The least number of inputs: an eighth of them judges what the others choose."""

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Residual:
    """How far one layer's output was from the original's, before and after, as a share of its root mean square.

    Of replaced layers on the original's own inputs; the last one, ``output``, is the whole model's. Both are of inputs
    that nothing was fitted to.
    """

    name: str
    before: float
    after: float


class Residuals(list[Residual]):
    """What calibration came to, layer by layer.

    ``left`` says by name why convolutions and dense layers were not refitted; it is empty where none was to be.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left: Mapping[str, str] = {}


def calibrate(
    model: Any, original: Any, batches: Any = None, *, refit: bool = True, advance: Advance = lambda done: None
) -> Residuals:
    r"""Bring a patched model nearer to the model before the patch, on unlabelled inputs.

    Called as ``calibrate(report, batches)``, with what `patch` returned, or ``calibrate(model, original, batches)``.
    One pass of the original over the batches takes each replaced layer's first two moments of every sample,
    :math:`M_1, M_2`, and each layer is then solved by itself: the scale and shift that the layer in front takes, where
    one does, and γ′ and β′ get the values of least error, which :math:`M_1` and :math:`M_2` tell exactly (see
    docs/design.md). An eighth of the inputs is kept aside and decides for each layer between that, standardized
    channels, the carry-over and what the model has: no layer is further from the original on them than before.

    With ``refit`` the convolutions and dense layers are refitted next, all at once and part of the way each time: to
    the weights :math:`W'` that take what reaches them now to what they return in the original, by least squares with a
    ridge towards their own, :math:`\min \sum \lVert y - W' x \rVert^2 + \lambda \lVert W' - W \rVert^2`. That is kept
    as far as it brings the model's output nearer on the inputs kept aside. Frozen, shared and very wide layers
    stay, and such as compute something else than their weights times their input.

    What ends it early, an error or Ctrl-C, leaves the model as it was.
    It takes time linear in the depth and the number of inputs, and holds two numbers a layer, channel and input.

    Args:
        model: The report of `patch`, or the patched model, which is changed. It has not been trained since the patch.
        original: The model before the patch; beside a report, which knows that, the batches.
        batches: Inputs as the model takes them, without labels, 16 or more of them together; a few hundred do. They are
            iterated over several times; an iterator is held in memory, and an array is one batch.
        refit: False leaves all layers alone that the patch did.
        advance: Told after each batch how many the original has seen.

    Returns:
        The `Residual` of each replaced layer, and of the model's output, as `Residuals`, whose ``left`` says which
        convolutions and dense layers were not refitted, and why.

    Raises:
        UnsupportedError: If the model has no replaced layers, or was trained since the patch.
        InputError: If the inputs are too few or not finite, or ``original`` lacks a layer of the model.
        VerificationError: If the inputs are constant at all layers.

    Example:
        >>> import copy, normswap, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> report = normswap.patch(model, "gn", example=torch.randn(2, 3, 8, 8))
        >>> residuals = normswap.calibrate(report, [torch.randn(32, 3, 8, 8)])
        >>> [(residual.name, residual.after <= residual.before) for residual in residuals]
        [('1', True), ('output', True)]
    """
    report = model if isinstance(model, Report) else None
    if (report is None) == (batches is None):
        raise TypeError(
            "expected calibrate(report, batches) or calibrate(model, original, batches), received "
            f"{'a report and' if report is not None else 'a model without a report and'} "
            f"{'no batches' if batches is None else 'both an original and batches'}"
        )
    if report is not None:
        model, original, batches = report.model, report.original(), original
    restore = get_framework(model).snapshot(model)
    try:
        with patcher_of(original).layers_by_name(original):
            run = _Calibration(model, original, batches, advance)
            residuals = run.solve()
            changes, residuals.left = run.refit() if refit else ([], {})
            residuals.append(Residual("output", run.before, run.drift()))
    except BaseException:
        restore()
        raise
    if report is not None:
        report.calibrated(run.found, changes)
    return residuals


def site_layers(model: Any) -> Mapping[str, Any]:
    """Return the replaced layers that calibration solves by name: none that compute the original already."""
    return layers_of(model).site_layers(model)


def sample(data: Data | NamedInputs, count: int) -> list[Any]:
    """Return ``count`` inputs drawn from ``data`` in batches of 64; warns if there are fewer."""
    if len(data) < count:
        warnings.warn(
            f"expected {count} {data.what} to calibrate on, received {len(data)}; see what the residuals say",
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


class _Calibration:
    """One calibration of ``model`` by ``original`` on batches, of which the last eighth is kept aside."""

    def __init__(self, model: Any, original: Any, batches: Iterable[Any], advance: Advance) -> None:
        self.model, self.original = model, original
        self.adapter: CalibrationLayers = layers_of(model)
        self.sites = self.adapter.site_layers(model)
        if not self.sites:
            raise UnsupportedError("expected a patched model to calibrate, received one without replaced layers")
        self.batches = several.batches(batches)
        self.known = dict(get_framework(original).named_layers(original))
        if missing := [name for name in self.sites if name not in self.known]:
            raise InputError(
                "expected an original with the layers of the model, which it is before the patch, received one "
                f"without {', '.join(missing)}"
            )
        self.solvable = self.adapter.solvable(model, original, self.sites)
        if not self.solvable:
            raise UnsupportedError(
                "expected replaced layers whose BatchNorms keep running statistics to calibrate, received none that do"
            )
        self.found: dict[str, Equalized] = {}
        self.advance = advance
        self.samples = self._pass()
        self.others = list(_last(self.batches, kept_aside(self.count)))
        self.before = self.drift()

    def _pass(self) -> dict[str, Samples]:
        """Run the original once, and take each site's moments of every sample."""
        framework = get_framework(self.original)
        moments: dict[str, list[tuple[NDArray[Any], NDArray[Any]]]] = {name: [] for name in self.solvable}

        def see(name: str, x: Any, y: Any) -> None:
            self.solvable[name].spatial = self.adapter.spatial(self.known[name], x)
            moments[name].append(self.adapter.moments(self.known[name], x, self.solvable[name].state))

        self.count, self.total = 0, 0
        watched = {name: self.known[name] for name in self.solvable}
        with framework.inference(self.original, compiled=False), framework.watching(watched, see):
            for batch in self.batches:
                self.count += size_of(batch)
                self.total += 1
                self._call(batch)
                self.advance(self.total)
        if self.count < FEWEST:
            raise InputError(
                f"expected {FEWEST} or more inputs to calibrate on, received {self.count}; a few hundred are good"
            )
        if idle := [name for name, found in moments.items() if not found]:
            raise InputError(
                f"expected inputs on which every replaced layer runs, received batches on which {idle[0]} does not; "
                f"patch without it: {option('exclude', idle[0])}"
            )
        samples = {
            name: Samples(*(np.concatenate(each) for each in zip(*found, strict=True)))
            for name, found in moments.items()
        }
        for name, each in samples.items():
            if not (np.isfinite(each.mean).all() and np.isfinite(each.square).all()):
                raise InputError(f"expected finite inputs and outputs, received batches on which {name} has others")
        if all(
            np.ptp(each.square, axis=0).max() <= 1e-9 and np.ptp(each.mean, axis=0).max() <= 1e-6
            for each in samples.values()
        ):
            first = next(iter(samples))
            raise VerificationError(f"expected inputs that differ, received batches on which {first} is constant")
        return samples

    def _call(self, batch: Any) -> None:
        try:
            get_framework(self.original).call(self.original, batch)
        except Exception as error:
            message = f"expected inputs the model accepts, received a batch on which it fails: {said(error)}"
            raise InputError(message) from error

    def solve(self) -> Residuals:
        """Solve every site, and return how far each was and is from the original on the inputs kept aside."""
        residuals = Residuals()
        presents = {name: self._present(site) for name, site in self.solvable.items()}  # before anything changes
        for name, samples in self.samples.items():
            site, present = self.solvable[name], presents[name]
            now = error_of(present, site.target, samples, groups=site.groups, spatial=site.spatial, gates=site.gates)
            found = equalize(
                site.state,
                site.target,
                site.front,
                groups=site.groups,
                spatial=site.spatial,
                mode=site.mode,
                samples=samples,
                gates=site.gates,
            )
            if found.error < now:
                self.adapter.write(site, found)
            self.found[name] = found if found.error < now else present
            residuals.append(Residual(name, float(np.sqrt(now)), float(np.sqrt(min(found.error, now)))))
        return residuals

    def _present(self, site: Solvable) -> Equalized:
        """Return what a replaced layer and the one in front compute now.

        Raises `UnsupportedError` if the latter is no longer the original's, scaled and shifted.
        """
        layer, front, before = site.layers
        mean, deviation = site.state.running()
        scale, shift = deviation, mean
        if front is not None:
            (old, old_bias), (new, bias) = map(self.adapter.front_weights, (before, front))
            factor = factor_since(old, new)
            if np.square(new - factor[:, None] * old).sum() > 1e-6 * np.square(new).sum():
                raise UnsupportedError(
                    f"expected a model that has not changed since the patch, received one whose {site.front_name} has; "
                    "calibrate before training, and once"
                )
            shift = (0.0 if bias is None else bias) - ((0.0 if old_bias is None else old_bias) - mean) * factor
            scale = factor * deviation
        gamma, beta = self.adapter.get_affine(layer)
        return Equalized(site.state, scale, shift, gamma, beta, None, "carried over", 0.0, 0.0)

    def drift(self) -> float:
        """Return how far the model's outputs are from the original's on the inputs kept aside."""
        distance = scale = 0.0
        for batch in self.others:
            wanted, found = (
                [np.asarray(y, np.float64) for y in self.adapter.outputs(net, batch)]
                for net in (self.original, self.model)
            )
            distance += sum(float(np.square(y - z).sum()) for y, z in zip(wanted, found, strict=True))
            scale += sum(float(np.square(y).sum()) for y in wanted)
        return float(np.sqrt(distance / scale)) if scale > 0 else 0.0

    def refit(self) -> tuple[list[Refitted], dict[str, str]]:
        """Refit the layers whose weights may change, as far as that helps; return what did, and why others may not."""
        layers = self.adapter.linear_layers(self.model)
        fitting = list(_first(self.batches, self.count - kept_aside(self.count)))
        return refitted(self.adapter, self.model, self.original, layers, self.found, self.solvable, fitting, self.drift)


def _cut(batch: Any, rows: slice) -> Any:
    """Return some samples of a batch, or all where its arrays are not of so many samples each, as a graph's."""
    inputs = Inputs.of(batch)
    return batch if inputs.samples is None else inputs.taken(rows)


def _first(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """Yield the first ``count`` inputs or a few more, batch by batch."""
    for batch in batches:
        if count <= 0:
            return
        size = size_of(batch)
        yield (batch if size <= count else _cut(batch, slice(count)))
        count -= size


def _last(batches: Iterable[Any], count: int) -> Sequence[Any]:
    """Return the last ``count`` inputs or a few more, batch by batch."""
    kept: list[Any] = []
    held = 0
    for batch in batches:
        kept.append(batch)
        held += size_of(batch)
        while held - size_of(kept[0]) >= count:
            held -= size_of(kept.pop(0))
    surplus = held - count
    if surplus > 0:
        kept[0] = _cut(kept[0], slice(surplus, None))
    return kept
