"""Plan and replace the BatchNorms of a PyTorch module tree."""

import copy
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convert.carry_over import BatchNormState
from ..convert.recipe import Recipe, Rules
from ..convert.targets import Target
from ..sources.lifting import lifted
from . import torch_drift, torch_sites
from .plan import Plan, Report, Site, decide
from .swap import carry_out
from .torch_sites import MARK, call, inference, named_modules, normalized
from .torch_swap import Swap, read_state

__all__ = ["MARK", "call", "find_sites", "inference", "normalized", "patch", "plan"]


def plan(
    model: nn.Module,
    target: Target | Recipe | Rules,
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[nn.Module, str], bool] | None = None,
) -> Plan:
    """Return what `patch` would do to ``model``, touching nothing; an example initialises what is lazy."""
    with lifted(model):
        return _decided(model, target, example, include, exclude, where)[0]


def patch(
    model: nn.Module,
    target: Target | Recipe | Rules,
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[nn.Module, str], bool] | None = None,
    inplace: bool = True,
) -> Report:
    """Replace the BatchNorms of ``model`` by ``target`` and return the report.

    Every replacement is built before the first is put in place; if anything fails, the model is as it was.
    """
    if not inplace:
        model = copy.deepcopy(model)
    with lifted(model) as graphs, _collector_paused():
        decided, modules = _decided(model, target, example, include, exclude, where)
        decided.require_work()
        owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        like = next((p for p in model.parameters() if p.is_floating_point()), None)
        swaps = [Swap(modules[decision.site.name], decision, owners, like) for decision in decided.having("replace")]
    lifts = [graph.of({swap.name for swap in swaps}) for graph in graphs]
    with _collector_paused():
        return carry_out(model, decided, [*lifts, *swaps], lambda: _batch_norms(model), torch_drift)


def find_sites(model: nn.Module, example: Any = None) -> tuple[list[nn.Module], list[Site]]:
    """Return the BatchNorms of ``model`` and what is known of each; see `torch_sites.find_sites`."""
    with lifted(model):
        return torch_sites.find_sites(model, example)


def _batch_norms(model: nn.Module) -> Iterator[str]:
    return (name for name, module in named_modules(model) if isinstance(module, _BatchNorm))


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


def _decided(
    model: nn.Module,
    target: Target | Recipe | Rules,
    example: Any,
    include: Sequence[str],
    exclude: Sequence[str],
    where: Callable[[nn.Module, str], bool] | None,
) -> tuple[Plan, dict[str, nn.Module]]:
    """Return the plan, and the module of each site by name."""
    found, sites = torch_sites.find_sites(model, example)
    modules = dict(zip((site.name for site in sites), found, strict=True))
    selected = None if where is None else lambda name: where(modules[name], name)

    def state_of(name: str) -> BatchNormState | None:
        return read_state(modules[name])

    decided = decide("torch", sites, target, include=include, exclude=exclude, where=selected, state_of=state_of)
    return decided, modules
