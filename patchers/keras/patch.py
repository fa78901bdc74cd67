"""Plan and replace the BatchNorms of a Keras model.

A site keeps its identity: the layer object stays and only its class and contents change. Graphs, shared
layers and custom code that holds the layer work on without being rebuilt, in models of every kind.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras

from ...convert.recipe import Recipe, Rules
from ...convert.targets import Target
from ...errors import UnsupportedError
from ...frameworks.keras import distinct_layers, named_layers
from ..plan import Plan, Report, decide
from ..swap import carry_out
from .names import renamed
from .saving import keep_rebuildable
from .sites import find_sites
from .swap import MARK, read_state, swaps_for


def plans(
    model: keras.Layer,
    targets: Sequence[Target | Recipe | Rules],
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[keras.Layer, str], bool] | None = None,
) -> list[Plan]:
    """Return what `patch` would do to ``model`` for each target, touching nothing but what is unbuilt."""
    found = _Found(model, example)
    return [found.decide(target, include, exclude, where) for target in targets]


def patch(
    model: keras.Layer,
    target: Target | Recipe | Rules,
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[keras.Layer, str], bool] | None = None,
    inplace: bool = True,
) -> Report:
    """Replace the BatchNorms of ``model`` by ``target`` and return the report.

    Every replacement is built before the first is put in place; if anything fails, the model is as it was. A
    compiled model stays compiled: its traced functions are dropped, and an optimizer that had been built is
    rebuilt for the new variables, with its step and the state of those that remain.
    """
    if not inplace:
        model = _copy(model)
    found = _Found(model, example)
    decided = found.decide(target, include, exclude, where)
    decided.require_work()
    swaps = swaps_for(model, found.layers, decided.having("replace"))
    return carry_out(
        model,
        decided,
        swaps,
        lambda: (site.name for site in find_sites(model)[1] if site.kind is None),
        around=lambda: _retraced(model),
    )


@contextmanager
def layers_by_name(model: keras.Layer) -> Iterator[Mapping[str, keras.Layer]]:
    """Give every layer by name within the context."""
    yield dict(named_layers(model))


class _Found:
    """The sites of a model, and the layer of each by name."""

    def __init__(self, model: keras.Layer, example: Any) -> None:
        layers, self.sites = find_sites(model, example)
        self.layers = dict(zip((site.name for site in self.sites), layers, strict=True))

    def decide(
        self,
        target: Target | Recipe | Rules,
        include: Sequence[str],
        exclude: Sequence[str],
        where: Callable[[keras.Layer, str], bool] | None,
    ) -> Plan:
        """Return the plan for one target."""
        return decide(
            "keras",
            self.sites,
            renamed(target, list(self.layers)) if isinstance(target, Recipe) else target,
            include=include,
            exclude=exclude,
            where=None if where is None else lambda name: where(self.layers[name], name),
            state_of=lambda name: read_state(self.layers[name]),
        )


def _copy(model: keras.Layer) -> keras.Layer:
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedError(
            "expected a model that Keras can save and load, which inplace=False needs, received "
            f"{type(model).__name__}: {error}; patch the model itself, or a copy that your own code makes"
        ) from error
    for new, old in zip(distinct_layers(twin), distinct_layers(model), strict=True):
        new.__dict__.update({MARK: old.__dict__[MARK]} if MARK in old.__dict__ else {})
    return twin


@contextmanager
def _retraced(model: keras.Layer) -> Iterator[None]:
    """Run a body that changes variables, then have every model within trace and optimize the new ones."""
    models = [layer for layer in distinct_layers(model) if isinstance(layer, keras.Model)]
    before = [list(map(id, each.trainable_variables)) for each in models]
    yield
    for each, ids in zip(models, before, strict=True):
        each.train_function = each.test_function = each.predict_function = None
        optimizer, variables = getattr(each, "optimizer", None), each.trainable_variables
        if optimizer is not None and optimizer.built and list(map(id, variables)) != ids:
            _renew(optimizer, variables)
    for layer in distinct_layers(model):
        if hasattr(layer, "_track_variables"):  # the torch backend lists variables once more
            layer._track_variables()
    keep_rebuildable(model)


def _renew(optimizer: Any, variables: list[Any]) -> None:
    """Rebuild an optimizer for ``variables``, keeping the object, its step and the state of those it knows."""
    new = type(optimizer).from_config(optimizer.get_config())
    new.build(variables)
    paths = Counter(variable.path for variable in optimizer.variables)
    old = {variable.path: variable for variable in optimizer.variables if paths[variable.path] == 1}
    for variable in new.variables:
        if variable.path in old and variable.shape == old[variable.path].shape:
            variable.assign(old[variable.path].numpy())
    optimizer.__dict__.clear()
    optimizer.__dict__.update(new.__dict__)
