"""The way back: the norms of a model become BatchNorms, by a line through what they return over what they are given."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..convert.line import Line, LineFit
from ..convert.recipe import Choice, Recipe, Rules
from ..convert.state import BatchNormState
from ..convert.targets import BatchNorm, Target
from ..errors import InputError, UnsupportedError, UsageError, option, spoken
from ..frameworks import several
from ..frameworks.detect import framework_of, get_framework
from ..frameworks.example import Inputs
from .contract import NormPatcher, norm_patcher_of, patcher_of
from .plan import Plan, Report, decide
from .swap import Swap, carry_out
from .table import as_text, plan_table

FEWEST = 16
"""Least number of inputs to fit lines to; see docs/design.md for what few of them cost."""

State = BatchNormState | None
See = Callable[[str, NDArray[Any], NDArray[Any]], None]


@dataclass(frozen=True)
class Drop:
    """The distance of a BatchNorm's output from the norm's, root mean square, as a share of the norm's deviation.

    ``before`` on the inputs the norm had, ``after`` in the converted model, with what the layers before it changed.
    """

    name: str
    before: float
    after: float


class WayBackPlan(Plan):
    """One decision for every norm of a model, in the model's own order."""

    def problem(self) -> str:
        """Return why the plan cannot be carried out; "" if it can be."""
        if refused := self.having("refuse"):
            lines = "\n".join(f"  {d.site.name} ({d.site.source}): {d.note}" for d in refused)
            return (
                f"expected norms that can become BatchNorms, received {len(refused)} that cannot:\n{lines}\n"
                f"leave such a layer as it is with {option('exclude', 'NAME')}"
            )
        if self.having("replace"):
            return ""
        skipped = self.having("skip")
        reasons = "; ".join(sorted({decision.note for decision in skipped}))
        found = f"{len(skipped)} norm{'' if len(skipped) == 1 else 's'}, all skipped ({reasons})" if skipped else "none"
        again = spoken("", "; BatchNorm(reestimate=True) measures the running statistics of BatchNorms anew")
        there = again if any(decision.site.kind == BatchNorm.kind for decision in skipped) else ""
        return f"expected a model with norms to make BatchNorms of, received {found}{there}"

    def table(self, *, all: bool = False) -> str:
        """Return the plan as a table of text, as `print` shows it; ``all`` gives every norm a row of its own."""
        count = len(self.decisions)
        return as_text(plan_table(f"plan for {count} norm{'' if count == 1 else 's'}", self.decisions, every=all))


@dataclass
class WayBackReport(Report):
    """What became of a model's norms, the way back, and what each line leaves unexplained: ``drops``."""

    drops: tuple[Drop, ...] = ()

    def __str__(self) -> str:
        return as_text(plan_table(self.summary, self.plan.decisions, drops=map(vars, self.drops)))


def is_way_back(target: Target | Recipe | Rules) -> bool:
    """Return whether a target makes BatchNorms; raises `InputError` for a recipe or rules that also make others."""
    if isinstance(target, Recipe):
        kinds = {choice.target.kind for choice in target.choices}
    elif isinstance(target, Rules):
        kinds = {rule.target.kind for rule in target.rules if rule.target is not None}
    else:
        kinds = {target.kind}
    if BatchNorm.kind in kinds and len(kinds) > 1:
        raise InputError(
            f"expected layers that all become bn, or none that does, received {', '.join(sorted(kinds))} in one "
            f"{type(target).__name__.lower()}; patch twice"
        )
    return BatchNorm.kind in kinds


def plan(
    model: Any,
    target: Target | Recipe | Rules,
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[Any, str], bool] | None = None,
) -> Plan:
    """Return what `patch` would do to ``model``, touching nothing but what is not built yet."""
    return _Found(model, example).decide(target, include, exclude, where)


def patch(
    model: Any,
    target: Target | Recipe | Rules,
    data: Any,
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[Any, str], bool] | None = None,
) -> WayBackReport:
    """Make BatchNorms of the norms of ``model``, in place, and return the report; see `normswap.patch`.

    One pass over the data as the model is fits every line, sums being all that is kept; a second one tells what comes
    of them together. BatchNorms to be measured anew are, in a pass of their own, with all others in place.
    """
    found = _Found(model, example)
    decided = found.decide(target, include, exclude, where)
    decided.require_work()
    replaced = decided.having("replace")
    anew = [d.site.name for d in replaced if d.site.kind == BatchNorm.kind]
    exact = {d.site.name: found.adapter.exact_state(found.layers[d.site.name]) for d in replaced}
    fitted = [name for name, state in exact.items() if state is None and name not in anew]
    batches = _Batches(model, data, [*fitted, *anew], example) if fitted or anew else None
    axes = {name: found.adapter.channel_axis(found.layers[name]) for name in exact}
    lines, shapes = _lines(found, fitted, axes, batches)

    @cache
    def measured() -> Mapping[str, LineFit]:
        assert batches is not None
        seen = {name: LineFit() for name in anew}
        again = {name: found.layers[name] for name in anew}
        batches.run({}, _blind, lambda: found.adapter.by_the_batch(again, seen))
        _require_fitting(seen)
        return seen

    def state_of(name: str) -> State:
        if name in anew:
            moments = measured()[name]
            none = np.zeros_like(moments.mean[0])
            return BatchNormState(none, none, moments.mean[0], moments.moments[0], 1.0)
        if name in lines:
            return lines[name].batch_norm(found.adapter.epsilon(found.layers[name]))
        return exact[name]

    decided = _seen(decided, shapes)
    swaps = found.adapter.swaps_back(model, found.layers, decided.having("replace"), state_of)
    report = carry_out(
        model,
        decided,
        swaps,
        lambda: (),
        around=lambda: found.adapter.around(model),
        lost="undoing would lose what they have learned: load the model from before again",
    )
    try:
        drops = _drops(found, swaps, lines, axes, batches)
    except BaseException:
        report.undo()
        raise
    return WayBackReport(report.model, decided, report._undo, report._drift, drops=drops)


def replay(model: Any, recipe: Recipe) -> Recipe:
    """Give a fresh model the layers that a recipe says, for its weights to be loaded, and return the recipe fitted.

    Unlike in `patch`, norms that become BatchNorms need no data, and both ways may be in one recipe: a norm of the
    model's own that is to be another one is a BatchNorm in between. What is a BatchNorm stays one.
    """
    if any(_goes_back(choice) for choice in recipe.choices):
        found = _Found(model, None)
        recipe = found.adapter.fitted(recipe, list(found.layers))
        others = {site.name for site in found.sites if site.kind != BatchNorm.kind}
        back = tuple(replace(choice, target=BatchNorm()) for choice in recipe.choices if choice.name in others)
        decided = found.decide(replace(recipe, choices=back), (), (), None)
        swaps = found.adapter.swaps_back(model, found.layers, decided.having("replace"), lambda name: None)
        carry_out(model, decided, swaps, lambda: (), around=lambda: found.adapter.around(model))
    stay = tuple(choice for choice in recipe.choices if choice.target.kind == BatchNorm.kind)
    there = tuple(choice for choice in recipe.choices if choice not in stay)
    if there:
        made = patcher_of(model).patch(model, replace(recipe, choices=there), solve=False).recipe.choices
        sources = {choice.name: choice.source for choice in there}
        there = tuple(replace(choice, source=sources.get(choice.name, choice.source)) for choice in made)
    patcher_of(model).make_room(model, [choice.front for choice in stay if choice.mode == "full"])
    return replace(recipe, choices=(*there, *stay))


def _goes_back(choice: Choice) -> bool:
    """Return whether a site is or was on the way back, and may be another norm in a fresh model."""
    was_batch_norm = "batchnorm" in choice.source.lower().replace("_", "")
    return choice.target.kind == BatchNorm.kind or not was_batch_norm


class _Found:
    """The norms of a model, and the layer of each by name."""

    def __init__(self, model: Any, example: Any) -> None:
        self.model = model
        self.adapter: NormPatcher = norm_patcher_of(model)
        layers, self.sites = self.adapter.find_norms(model, example)
        self.layers = dict(zip((site.name for site in self.sites), layers, strict=True))

    def decide(
        self,
        target: Target | Recipe | Rules,
        include: Sequence[str],
        exclude: Sequence[str],
        where: Callable[[Any, str], bool] | None,
    ) -> Plan:
        """Return the plan for one target."""
        decided = decide(
            framework_of(self.model),
            self.sites,
            self.adapter.fitted(target, list(self.layers)) if isinstance(target, Recipe) else target,
            include=include,
            exclude=exclude,
            where=None if where is None else lambda name: where(self.layers[name], name),
            what="norm",
        )
        return WayBackPlan(decided.framework, decided.decisions)


class _Batches:
    """The inputs to fit to, as often as they are wanted, each checked the first time it is seen."""

    def __init__(self, model: Any, data: Any, needing: Sequence[str], example: Any) -> None:
        if data is None:
            count = f"{len(needing)} norm{'' if len(needing) == 1 else 's'} (first: {needing[0]})"
            raise UsageError(
                f"expected {spoken('--calibrate DATA', 'data')} to fit BatchNorms to, which {count} cannot do without, "
                f"received {spoken('none', 'data=None')}; a few hundred images without labels do"
            )
        self.model, self.framework = model, get_framework(model)
        self.data = several.batches(data)
        self.sizes = None if example is None else _sizes(example)
        self.checked = False

    def run(
        self,
        layers: Mapping[str, Any],
        see: See,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Run the model on every batch within ``around()``, and tell ``see(name, input, output)`` of the layers."""
        for batch in self:
            with around():
                self.call(batch, layers, see)

    def call(self, batch: Any, layers: Mapping[str, Any], see: See) -> None:
        """Run the model on one batch, as `run` does."""

        def note(name: str, x: Any, y: Any) -> None:
            see(name, self.framework.to_numpy(x), self.framework.to_numpy(y))

        try:
            with (
                self.framework.inference(self.model, compiled=False),
                self.framework.watching(layers, note, first=True),
            ):
                self.framework.call(self.model, batch)
        except InputError:
            raise
        except Exception as error:
            sizes = ", ".join(map(str, _sizes(batch))) or type(batch).__name__
            raise InputError(
                f"expected batches of inputs alone, as the model takes them, received one of {sizes} on which it "
                f"fails: {error}"
            ) from error

    def __iter__(self) -> Iterator[Any]:
        """Give every batch, after a look at it the first time."""
        count, first, differ = 0, None, False
        for number, batch in enumerate(self.data):
            if not self.checked:
                arrays = [self._array(value) for value in Inputs.of(batch).arrays.values()]
                self._require_usable(number, batch, arrays)
                first = first or [array[:1] for array in arrays]
                differ = differ or not all(map(_repeats, arrays, first))
                count += len(arrays[0])
            yield batch
        if not self.checked:
            if count < FEWEST:
                raise InputError(
                    f"expected at least {FEWEST} inputs to fit BatchNorms to, received {count}; give more: 256 are good"
                )
            if not differ:
                raise InputError(
                    f"expected inputs that differ, received {count} that are all the same; give images as the model "
                    "will see them"
                )
        self.checked = True

    def _array(self, value: Any) -> NDArray[Any]:
        return self.framework.to_numpy(value) if hasattr(value, "detach") else np.asarray(value)

    def _require_usable(self, number: int, batch: Any, arrays: Sequence[NDArray[Any]]) -> None:
        if not arrays or arrays[0].ndim == 0:
            raise InputError(
                f"expected batches of inputs as the model takes them, received {type(batch).__name__} as batch {number}"
            )
        if self.sizes is not None and (found := _sizes(batch)) != self.sizes:
            raise InputError(
                f"expected inputs of the example's size, {_told(self.sizes)} each, received {_told(found)} in batch "
                f"{number}; resize them"
            )
        for array in arrays:
            if array.dtype.kind == "f" and (bad := np.count_nonzero(~np.isfinite(array))):
                raise InputError(
                    f"expected finite inputs, received NaN or infinity in {bad} of {array.size} values of batch "
                    f"{number}; leave such images out"
                )


def _lines(
    found: _Found, names: Sequence[str], axes: Mapping[str, int], batches: _Batches | None
) -> tuple[dict[str, Line], dict[str, tuple[int, ...]]]:
    """Return the line of each named norm, and the sizes of its first input but for batch and channels."""
    fits = {name: LineFit() for name in names}
    channels = {site.name: site.channels for site in found.sites}
    shapes: dict[str, tuple[int, ...]] = {}

    def fit(name: str, x: NDArray[Any], y: NDArray[Any]) -> None:
        axis = axes[name]
        if x.shape[axis] != channels[name]:
            raise InputError(
                f"expected inputs with a batch, in which axis {axis} of what {name} is given holds its "
                f"{channels[name]} channels, received shape={x.shape} there"
            )
        shape = tuple(np.moveaxis(x, axis, 1).shape[2:])
        if len(shapes.setdefault(name, shape)) != len(shape):
            raise InputError(f"expected {name} to be given inputs of one rank, received {shape} after {shapes[name]}")
        fits[name].add(np.moveaxis(x, axis, -1), np.moveaxis(y, axis, -1))

    if batches is not None and names:
        batches.run({name: found.layers[name] for name in names}, fit)
        _require_fitting(fits)
    return {name: each.line() for name, each in fits.items()}, shapes


def _drops(
    found: _Found, swaps: Sequence[Swap], lines: Mapping[str, Line], axes: Mapping[str, int], batches: _Batches | None
) -> tuple[Drop, ...]:
    """Return what each line leaves unexplained, by itself and with all in place."""
    if batches is None or not lines:
        return ()
    layers = {name: found.layers[name] for name in lines}
    wanted: dict[str, list[NDArray[Any]]] = {name: [] for name in lines}
    squares, counts = dict.fromkeys(lines, 0.0), dict.fromkeys(lines, 0)

    def keep(name: str, x: NDArray[Any], y: NDArray[Any]) -> None:
        wanted[name].append(y)

    def compare(name: str, x: NDArray[Any], y: NDArray[Any]) -> None:
        squares[name] += float(np.square(y.astype(np.float64) - wanted[name].pop(0)).sum())
        counts[name] += y.size // y.shape[axes[name]]

    for batch in batches:
        with ExitStack() as stack:
            for swap in swaps:
                stack.enter_context(swap.as_original())
            batches.call(batch, layers, keep)
        batches.call(batch, layers, compare)
    return tuple(
        Drop(name, line.drop, float(np.sqrt(squares[name] / counts[name] / line.out.sum())) if line.out.any() else 0.0)
        for name, line in lines.items()
    )


def _seen(decided: Plan, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """Return the plan with the shapes that the data showed."""
    return replace(
        decided,
        decisions=tuple(
            replace(d, site=replace(d.site, spatial=shapes.get(d.site.name, d.site.spatial))) for d in decided.decisions
        ),
    )


def _require_fitting(fits: Mapping[str, LineFit]) -> None:
    """Raise for norms that did not run, returned what is not finite, or were given constants alone."""
    if idle := [name for name, fit in fits.items() if fit.count == 0]:
        raise UnsupportedError(
            f"expected inputs that reach every norm, received some that do not reach {', '.join(idle)}; give others, "
            f"or leave such a layer as it is with {option('exclude', idle[0])}"
        )
    if bad := [name for name, fit in fits.items() if not fit.is_finite]:
        raise InputError(
            f"expected norms that return finite values, received NaN or infinity at {', '.join(bad)}; look for what "
            "overflows before the first"
        )
    if constant := [name for name, fit in fits.items() if fit.is_constant]:
        raise InputError(
            f"expected inputs that differ, received some on which every channel of {constant[0]} is constant; give "
            f"images as the model will see them, or leave the layer as it is with {option('exclude', constant[0])}"
        )


def _blind(name: str, x: NDArray[Any], y: NDArray[Any]) -> None:
    """See nothing."""


def _repeats(array: NDArray[Any], sample: NDArray[Any]) -> bool:
    """Return whether ``array`` is one sample again and again."""
    return array.shape[1:] == sample.shape[1:] and bool((array == sample).all())


def _sizes(example: Any) -> list[tuple[int, ...]]:
    return [tuple(array.shape[1:]) for array in Inputs.of(example).arrays.values()]


def _told(sizes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, size)) for size in sizes)
