"""What will be done to a model, decided before it is touched, and what was done: framework-free."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod, sqrt
from typing import TYPE_CHECKING, Any, Literal

from ..convert.equalize import Equalized, Front, equalize
from ..convert.expected_drift import expected_drift, folds
from ..convert.gates import warm_gates
from ..convert.groups import resolve_groups
from ..convert.recipe import Choice, Recipe, Rule, Rules
from ..convert.state import BatchNormState
from ..convert.targets import BatchNorm, BatchRenorm, GroupNorm, Mode, SwitchNorm, Target, target_to_dict
from ..errors import InputError, UnsupportedError, option, spoken
from .table import as_text, plan_table

if TYPE_CHECKING:
    from .measured_drift import Drift

Action = Literal["replace", "skip", "refuse", "done"]


_NO_STATISTICS = "it keeps no running statistics to carry over"


@dataclass(frozen=True)
class Site:
    """One BatchNorm in a model, with every name it is reachable by.

    On the way back a site is any norm, and ``kind`` is "bn" where that is a BatchNorm.

    ``spatial`` is the shape behind the channels as a dry run saw it: () for (N, C) input, None without a dry run.
    ``obstacle`` says why this site cannot be replaced, "" where it can; ``left`` why it is left alone unless it is
    included by name. ``kind`` is the target kind of a site that has been replaced already. ``has_statistics`` is
    False where no running statistics exist, ``any_rank`` True where the layer does not tell how many dimensions it is
    for. ``by_the_batch`` says that code gives it ``training=True`` at inference too. ``read_by`` names code of the
    model that reads its running statistics, ``mode_set_by`` code that puts BatchNorms in a mode by their class,
    ``masked_by`` what of the example tells of padding. ``front`` is the name of the linear layer whose output this site
    alone reads, as a dry run saw it, and ``front_biased`` whether that has a bias; "" where ``unequal`` says why there
    is none. ``goes_in`` tells whether a scale and a shift in its place would go into a linear layer before it in an
    exported file, and what lies between with them; None where that is not known.
    """

    name: str
    source: str
    channels: int
    aliases: tuple[str, ...] = ()
    spatial: tuple[int, ...] | None = None
    obstacle: str = ""
    left: str = ""
    kind: str | None = None
    has_statistics: bool = True
    any_rank: bool = False
    by_the_batch: bool = False
    read_by: str = ""
    mode_set_by: str = ""
    masked_by: str = ""
    front: str = ""
    front_biased: bool = False
    unequal: str = "no example shows what is in front"
    goes_in: bool | None = None


@dataclass(frozen=True)
class Decision:
    """What happens to one site: replaced by ``target``, skipped, refused, or done by an earlier patch.

    ``drift`` is what a replacement is expected to change of the site's output (see `expected_drift`), None where
    nothing tells; ``folds`` whether an exported file is rid of it, None where that is not known. ``front`` is the
    name of the layer in front that takes a scale, and with the ``mode`` "full" a shift, so that the replacement's
    statistics vary little from sample to sample (see `equalize`); "" where no other layer changes. ``constant`` is
    how many channels have a running variance of 0, ``muted`` how many a gamma of 0.
    """

    site: Site
    action: Action
    target: Target | None = None
    note: str = ""
    drift: float | None = None
    front: str = ""
    mode: Mode | None = None
    constant: int = 0
    muted: int = 0

    @property
    def adds_bias(self) -> bool:
        """Whether the layer in front gets a bias that it did not have: a new parameter."""
        return self.mode == "full" and not self.site.front_biased

    @property
    def folds(self) -> bool | None:
        """Whether the target folds into a linear layer before it at export, None where that is not known."""
        return self.site.goes_in if self.target is not None and folds(self.target) else False

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as plain data."""
        return {
            "name": self.site.name,
            "aliases": list(self.site.aliases),
            "source": self.site.source,
            "channels": self.site.channels,
            "shape": None if self.site.spatial is None else list(self.site.spatial),
            "action": self.action,
            "target": None if self.target is None else target_to_dict(self.target),
            "drift": self.drift,
            "folds": self.folds if self.action in ("replace", "done") else None,
            "equalize": {"front": self.front, "mode": self.mode, "new_bias": self.adds_bias} if self.front else None,
            "unequal": self.site.unequal if self.action == "replace" and not self.front else "",
            "note": self.note,
        }


@dataclass(frozen=True)
class Plan:
    """One decision for every site of a model, in the model's own order."""

    framework: str
    decisions: tuple[Decision, ...]

    def having(self, action: Action) -> list[Decision]:
        """Return the decisions with this action."""
        return [decision for decision in self.decisions if decision.action == action]

    def recipe(self) -> Recipe:
        """Return the replacements as a recipe; sites an earlier patch replaced are not in it."""
        return Recipe(
            self.framework,
            tuple(
                Choice(d.site.name, d.site.source, d.site.channels, d.target, d.site.spatial, d.front, d.mode)
                for d in self.having("replace")
                if d.target is not None
            ),
        )

    def problem(self) -> str:
        """Return why the plan cannot be carried out: a site is refused, or there is nothing to do; "" if it can be."""
        if refused := self.having("refuse"):
            lines = "\n".join(f"  {d.site.name} ({d.site.source}): {d.note}" for d in refused)
            unknown = (
                ", have it keep them (track_running_stats=True) and run the model on images in training mode first, or "
                f"copy gamma and beta by {option('include', '*')} and train the model"
                if any(d.note == _NO_STATISTICS for d in refused)
                else ""
            )
            return (
                f"expected BatchNorms that can be replaced, received {len(refused)} that cannot:\n{lines}\n"
                f"leave such a layer as it is with {option('exclude', 'NAME')}{unknown}"
            )
        if not self.having("replace") and not self.having("done"):
            skipped = self.having("skip")
            reasons = "; ".join(sorted({decision.note for decision in skipped}))
            count = f"{len(skipped)} BatchNorm{'' if len(skipped) == 1 else 's'}"
            found = f"{count}, all skipped ({reasons})" if skipped else "none"
            if any(decision.site.left and decision.note == decision.site.left for decision in skipped):
                found += f"; name what is to be replaced all the same with {option('include', 'NAME')}"
            return f"expected a model with BatchNorm layers to replace, received {found}"
        return ""

    def table(self, *, all: bool = False) -> str:
        """Return the plan as a table of text, as `print` shows it; ``all`` gives every site a row of its own."""
        count = len(self.decisions)
        return as_text(plan_table(f"plan for {count} BatchNorm{'' if count == 1 else 's'}", self.decisions, every=all))

    def __str__(self) -> str:
        return self.table()

    def require_work(self) -> None:
        """Raise `UnsupportedError` if the plan cannot be carried out."""
        if problem := self.problem():
            raise UnsupportedError(problem)


@dataclass
class Report:
    """What `patch` did: the model, the decisions, and the way back.

    ``undo()`` restores the original layers bit for bit. It raises `UnsupportedError` once a replaced layer has
    been trained, since no BatchNorm computes what the trained layer does.
    """

    model: Any
    plan: Plan
    _undo: Callable[[], None]
    _drift: Callable[[Any], list["Drift"]]
    _original: Callable[[], Any] = lambda: None
    _accept: Callable[[Mapping[str, Equalized], Sequence[Any]], None] = lambda found, others: None
    recipe: Recipe = field(init=False)

    def __post_init__(self) -> None:
        self.recipe = self.plan.recipe()

    @property
    def replaced(self) -> list[Decision]:
        """The sites replaced by this call."""
        return self.plan.having("replace")

    @property
    def skipped(self) -> list[Decision]:
        """The sites left alone, each with its reason in ``note``."""
        return self.plan.having("skip")

    @property
    def already(self) -> list[Decision]:
        """The sites an earlier patch had replaced."""
        return self.plan.having("done")

    def undo(self) -> None:
        """Restore the original layers; see the class."""
        self._undo()

    def drift(self, example: Any) -> list["Drift"]:
        """Return how far each replaced layer's output and the model's is from the original's on an example.

        The same inputs go through the model with its BatchNorms and as it is, both at inference; nothing of the model
        changes. Raises `UnsupportedError` after training or `undo`, `InputError` for an example on which it fails.
        """
        return self._drift(example)

    def original(self) -> Any:
        """Return a copy of the model as it was before the patch; raises `UnsupportedError` as `undo` does."""
        return self._original()

    def calibrated(self, found: Mapping[str, Equalized], others: Sequence[Any]) -> None:
        """Take note of what a calibration gave the replaced layers, for `undo`, `drift` and `original` to work on.

        ``others`` are changes of other layers, as `Swap`s.
        """
        self._accept(found, others)

    @property
    def summary(self) -> str:
        """How many sites were replaced, were so before, and were left."""
        return f"{len(self.replaced)} replaced, {len(self.already)} already patched, {len(self.skipped)} skipped"

    def __str__(self) -> str:
        return as_text(plan_table(self.summary, self.plan.decisions))


def decide(
    framework: str,
    sites: Sequence[Site],
    target: Target | Recipe | Rules,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[str], bool] | None = None,
    mode: Mode | None = None,
    state_of: Callable[[str], BatchNormState | None] = lambda name: None,
    front_of: Callable[[str], Front | None] = lambda name: None,
    what: str = "BatchNorm",
) -> Plan:
    """Return the plan that gives every selected site ``target``, or what a recipe or rules say of it.

    ``include`` and ``exclude`` are name patterns (see `matches`); ``where`` is asked the site's name last. A site to
    be left alone, or without running statistics, needs a pattern or a recipe that names it. ``mode`` says what the
    layers in front take; a recipe says so itself. ``state_of`` tells a site's values, from which the expected drift is
    computed, or None where it has none, ``front_of`` what is known of a layer in front by its name. ``what`` is what
    messages call a site.

    Raises `InputError` if a pattern or rule matches no site or a recipe does not fit the sites.
    """
    for pattern in (*include, *exclude):
        if sites and not any(matches(pattern, name) for site in sites for name in (site.name, *site.aliases)):
            known = ", ".join(site.name for site in sites[:5])
            raise InputError(f"expected a pattern that matches a {what}, received {pattern!r}; names begin {known}")
    unchosen: Mapping[str, str] = {}
    modes: Mapping[str, Mode | None] = {}
    if isinstance(target, Recipe):
        chosen = _recipe_targets(framework, sites, target, what)
        sites = [_as_chosen(site, target) for site in sites]
        modes = {choice.name: choice.mode for choice in target.choices}
    elif isinstance(target, Rules):
        chosen, unchosen = _rules_targets(sites, target)
    else:
        chosen = {site.name: target for site in sites}

    depth = sum(isinstance(each, SwitchNorm) for each in chosen.values())
    named = bool(include) or isinstance(target, Recipe)
    decisions = []
    for site in sites:
        names = (site.name, *site.aliases)
        if include and not any(matches(pattern, name) for pattern in include for name in names):
            decisions.append(Decision(site, "skip", note="not included"))
        elif any(matches(pattern, name) for pattern in exclude for name in names):
            decisions.append(Decision(site, "skip", note="excluded"))
        elif where is not None and not where(site.name):
            decisions.append(Decision(site, "skip", note="not selected by `where`"))
        elif site.name not in chosen:
            decisions.append(Decision(site, "skip", note=unchosen.get(site.name, "not in the recipe")))
        elif site.left and not named:
            decisions.append(Decision(site, "skip", note=site.left))
        else:
            mode_of = modes.get(site.name, mode)
            decisions.append(_decide_one(site, chosen[site.name], depth, mode_of, state_of, front_of, named=named))
    return Plan(framework, tuple(decisions))


def matches(pattern: str, name: str) -> bool:
    """Return whether a site's name matches a shell glob, or after ``re:`` a regular expression, as a whole.

    Raises `InputError` for what is no regular expression.
    """
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise InputError(f"expected a regular expression after re:, received {pattern!r} ({error})") from None


def _decide_one(
    site: Site,
    target: Target,
    depth: int,
    mode: Mode | None,
    state_of: Callable[[str], BatchNormState | None],
    front_of: Callable[[str], Front | None],
    *,
    named: bool,
) -> Decision:
    if isinstance(target, BatchNorm):
        return _decide_back(site, target)
    if site.kind is not None:
        if site.kind == target.kind:
            return Decision(site, "done", target, "patched before")
        note = f"already patched to {site.kind}: undo that first, or patch the original model to {target.kind}"
        return Decision(site, "refuse", target, note)
    if site.obstacle:
        return Decision(site, "refuse", target, site.obstacle)
    if site.channels == 0:
        return Decision(site, "refuse", target, "it has no channels")
    if site.any_rank and not isinstance(target, GroupNorm):
        example = spoken("--input-shape", "an example input")
        note = f"a {site.source} takes any number of dimensions: give {example} to see how many there are"
        return Decision(site, "refuse", target, note)
    if not site.has_statistics:
        if isinstance(target, SwitchNorm) and target.batch_statistics == "frozen":
            frozen = option("batch_statistics", "frozen")
            return Decision(site, "refuse", target, f"{frozen} needs running statistics to freeze")
        if not named:
            return Decision(site, "refuse", target, _NO_STATISTICS)
    groups = None
    notes = [] if site.has_statistics else ["no running statistics: gamma and beta are copied, expect a large drift"]
    if site.by_the_batch:
        notes.append("called with training=True: batch statistics at inference, the answer depends on the batch")
    if site.read_by and not isinstance(target, BatchRenorm):
        notes.append(f"{site.read_by} reads running statistics: fuse or reparameterize before the patch, not after")
    moves = isinstance(target, BatchRenorm) or (isinstance(target, SwitchNorm) and target.batch_statistics == "moving")
    if site.mode_set_by and moves:
        notes.append(
            f"{site.mode_set_by} sets the mode of BatchNorms by their class: set that of the replacement there"
        )
    if site.masked_by and site.spatial and not isinstance(target, BatchRenorm):
        notes.append(
            f"{site.masked_by} tells of padding, which a sample's statistics count too: use brn, or pad nothing"
        )
    if isinstance(target, GroupNorm):
        elements = None if site.spatial is None else prod(site.spatial)
        try:
            groups, note = resolve_groups(target, site.channels, elements, site.name)
        except UnsupportedError as error:
            return Decision(site, "refuse", target, str(error).removeprefix(f"{site.name}: "))
        target = GroupNorm(groups=groups)
        notes.append(note)
    elif isinstance(target, SwitchNorm) and not site.has_statistics and target.batch_statistics != "none":
        notes.append("its running statistics start at 0 and 1: fine-tune before use")
    state = state_of(site.name)
    constant = 0 if state is None or state.var is None else int((state.var == 0).sum())
    muted = 0 if state is None else int((state.gamma == 0).sum())
    for count, what in ((constant, "running variances"), (muted, "gammas")):
        if count:
            notes.append(f"{what} of {count} channel{'' if count == 1 else 's'} are 0")
    note = "; ".join(filter(None, notes))
    if not (site.front and site.has_statistics and equalizes(target)):
        mode = None
    if isinstance(target, SwitchNorm):
        target = warm_gates(target, depth, None if mode or state is None or state.problems() else state)
    if mode is None:
        drift = None if state is None else expected_drift(state, target, groups=groups, spatial=site.spatial)
        return Decision(site, "replace", target, note, drift, constant=constant, muted=muted)
    assert isinstance(target, GroupNorm | SwitchNorm)
    drift, front = None, front_of(site.front)
    if state is not None and front is not None and not state.problems():
        found = equalize(state, target, front, groups=groups, spatial=site.spatial, mode=mode)
        drift = sqrt(found.error)
    return Decision(site, "replace", target, note, drift, site.front, mode, constant, muted)


def _as_chosen(site: Site, recipe: Recipe) -> Site:
    """Return a site with the shape and the layer in front that a recipe's choice was made for."""
    for choice in recipe.choices:
        if choice.name == site.name:
            any_rank = site.any_rank and choice.spatial is None
            return replace(site, spatial=choice.spatial, any_rank=any_rank, front=choice.front or site.front)
    return site


def equalizes(target: Target) -> bool:
    """Return whether ``target`` gains by a layer in front that is scaled: it takes statistics of a sample."""
    if isinstance(target, SwitchNorm):
        return target.start != "exact" and target.compat is None
    return isinstance(target, GroupNorm)


def _decide_back(site: Site, target: BatchNorm) -> Decision:
    """Return what the way back makes of a norm; ``kind`` is "bn" of what is a BatchNorm."""
    if site.kind == target.kind and not target.reestimate:
        return Decision(site, "skip", note="a BatchNorm already")
    if site.obstacle:
        return Decision(site, "refuse", target, site.obstacle)
    notes = {BatchNorm.kind: "running statistics measured anew", BatchRenorm.kind: "exact: it is one at inference"}
    return Decision(site, "replace", target, notes.get(site.kind or "", ""))


def _recipe_targets(framework: str, sites: Iterable[Site], recipe: Recipe, what: str) -> dict[str, Target]:
    by_name = {site.name: site for site in sites}
    problems = list(_recipe_problems(framework, by_name, recipe, what))
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        listing = "\n".join(f"  {problem}" for problem in problems[:10])
        raise InputError(f"expected a recipe made for this model, received one that does not fit:\n{listing}{more}")
    return {choice.name: choice.target for choice in recipe.choices}


def _recipe_problems(framework: str, by_name: dict[str, Site], recipe: Recipe, what: str) -> Iterator[str]:
    if recipe.framework != framework:
        yield f"framework: the recipe is for {recipe.framework}, the model is {framework}"
        return
    for choice in recipe.choices:
        site = by_name.get(choice.name)
        if site is None:
            yield f"{choice.name}: no such {what}"
        elif site.channels != choice.channels:
            yield f"{choice.name}: {choice.channels} channels in the recipe, {site.channels} in the model"


def _rules_targets(sites: Sequence[Site], rules: Rules) -> tuple[dict[str, Target], dict[str, str]]:
    """Return what the first rule that a site fits makes of it, and why a site is left."""
    stages = _stages(sites)
    if sites and not stages and any(rule.stage is not None for rule in rules.rules):
        example = spoken("--input-shape", "an example")
        raise InputError(f"expected {example} for a rule by stage, which goes by the size of maps, received none")
    fits = [[_fits(rule, place, site, len(sites), stages) for rule in rules.rules] for place, site in enumerate(sites)]
    for index, rule in enumerate(rules.rules):
        if sites and not any(row[index] for row in fits):
            known = ", ".join(site.name for site in sites[:5])
            raise InputError(
                f"expected rules that each match a BatchNorm, received rule {index + 1} ({rule}) that matches none of "
                f"{len(sites)}; names begin {known}"
            )
    chosen, left = {}, {}
    for site, row in zip(sites, fits, strict=True):
        if True not in row:
            left[site.name] = "no rule matches"
        elif (target := rules.rules[row.index(True)].target) is None:
            left[site.name] = f"left by rule {row.index(True) + 1}"
        else:
            chosen[site.name] = target
    return chosen, left


def _fits(rule: Rule, place: int, site: Site, count: int, stages: Mapping[int, int]) -> bool:
    depth = (place + 0.5) / count  # the middle of the site's share
    within = rule.depth is None or rule.depth[0] <= depth <= rule.depth[1]
    there = rule.stage is None or (site.spatial is not None and stages[prod(site.spatial)] == rule.stage)
    return within and there and any(matches(rule.match, name) for name in (site.name, *site.aliases))


def _stages(sites: Sequence[Site]) -> dict[int, int]:
    """Return the stage of each size of maps, from the largest."""
    sizes = {prod(site.spatial) for site in sites if site.spatial is not None}
    return {size: stage for stage, size in enumerate(sorted(sizes, reverse=True))}
