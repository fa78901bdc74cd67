"""Plan and replace the BatchNorms of a PyTorch module tree."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...convert.recipe import Recipe, Rules
from ...convert.targets import Mode, Target
from ...frameworks.torch import copied, named_layers
from ..plan import Plan, Report, decide
from ..swap import Swap as Change
from ..swap import carry_out
from .equalized import Absorbed
from .fronts import read_front
from .lifting import lifted, lifts
from .sites import find_sites
from .swap import read_state, swaps_for


def plans(
    model: nn.Module,
    targets: Sequence[Target | Recipe | Rules],
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[nn.Module, str], bool] | None = None,
    mode: Mode | None = "full",
) -> list[Plan]:
    """Return what `patch` would do to ``model`` for each target, touching nothing but what is lazy."""
    with lifted(model):
        found = _Found(model, example)
        return [found.decide(target, include, exclude, where, mode) for target in targets]


def patch(
    model: nn.Module,
    target: Target | Recipe | Rules,
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[nn.Module, str], bool] | None = None,
    inplace: bool = True,
    mode: Mode | None = "full",
    solve: bool = True,
) -> Report:
    """Replace the BatchNorms of ``model`` by ``target`` and return the report.

    Every replacement is built before the first is put in place; if anything fails, the model is as it was.
    """
    if not inplace:
        model = copied(model)
    with lifted(model) as graphs, _collector_paused():
        found = _Found(model, example)
        decided = found.decide(target, include, exclude, where, mode, solve)
        decided.require_work()
        swaps = swaps_for(model, found.modules, decided.having("replace"), solve=solve)
    changed = {name for decision in decided.having("replace") for name in (decision.site.name, decision.front)}
    changes: list[Change] = [*(graph.of(changed) for graph in graphs), *swaps]
    with _collector_paused():
        return carry_out(model, decided, changes, lambda: _batch_norms(model), copied=copied)


class _Found:
    """The sites of a model, whose graphs are lifted, and the module of each by name."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        modules, self.sites = find_sites(model, example)
        self.modules = dict(zip((site.name for site in self.sites), modules, strict=True))
        self.layers = dict(named_layers(model))

    def decide(
        self,
        target: Target | Recipe | Rules,
        include: Sequence[str],
        exclude: Sequence[str],
        where: Callable[[nn.Module, str], bool] | None,
        mode: Mode | None,
        solve: bool = True,
    ) -> Plan:
        """Return the plan for one target."""
        return decide(
            "torch",
            self.sites,
            target,
            include=include,
            exclude=exclude,
            where=None if where is None else lambda name: where(self.modules[name], name),
            mode=mode,
            state_of=lambda name: read_state(self.modules[name]) if solve else None,
            front_of=lambda name: read_front(self.layers[name]) if name in self.layers else None,
        )


def make_room(model: nn.Module, names: Sequence[str]) -> None:
    """Give the linear layers of these names that have no bias one of zeros, for weights to be loaded.

    Those that are calls in a traced graph become modules.
    """
    for graph in lifts(model) if names else ():
        graph.of(names).apply()
    layers = dict(named_layers(model)) if names else {}
    for name in names:
        Absorbed(name, layers[name], "full").apply(None)


@contextmanager
def layers_by_name(model: nn.Module) -> Iterator[Mapping[str, nn.Module]]:
    """Give every module by name within the context, the layers that are calls in a traced graph, too."""
    with lifted(model):
        yield dict(named_layers(model))


def _batch_norms(model: nn.Module) -> Iterator[str]:
    return (name for name, module in named_layers(model) if isinstance(module, _BatchNorm))


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep Python's cyclic garbage collector from searching a growing heap again and again for what is not there."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
