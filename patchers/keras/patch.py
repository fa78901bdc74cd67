"""Plan and replace the BatchNorms of a Keras model.

A site keeps its identity: the layer object stays and only its class and contents change. Graphs, shared
layers and custom code that holds the layer work on without being rebuilt, in models of every kind.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import keras

from ...convert.expected_drift import folds
from ...convert.recipe import Recipe, Rules
from ...convert.targets import Mode, Target
from ...errors import InputError, UnsupportedError
from ...frameworks.keras import distinct_layers, named_layers
from ..plan import Plan, Report, Site, decide, equalizes
from ..swap import carry_out
from .around import models_around
from .equalized import BIASED, Absorbed
from .fronts import Fronts, channels_of, read_front
from .loading import keep_whole
from .names import alike, fronts_of, renamed
from .optimizers import Optimizers
from .saving import keep_rebuildable
from .sites import find_sites
from .swap import FRONT, MARK, read_state, swaps_for


def plans(
    model: keras.Layer,
    targets: Sequence[Target | Recipe | Rules],
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[keras.Layer, str], bool] | None = None,
    mode: Mode | None = "full",
) -> list[Plan]:
    """Return what `patch` would do to ``model`` for each target, touching nothing but what is unbuilt."""
    found = _Found(model, example)
    return [found.decide(target, include, exclude, where, mode) for target in targets]


def patch(
    model: keras.Layer,
    target: Target | Recipe | Rules,
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[keras.Layer, str], bool] | None = None,
    inplace: bool = True,
    mode: Mode | None = "full",
    solve: bool = True,
) -> Report:
    """Replace the BatchNorms of ``model`` by ``target`` and return the report.

    Every replacement is built before the first is put in place; if anything fails, the model is as it was. A
    compiled model, and one around it, stays compiled: its traced functions are dropped, and an optimizer that had been
    built goes on with the new variables too.
    """
    if not inplace:
        model = _copy(model)
    found = _Found(model, example)
    decided = found.decide(target, include, exclude, where, mode, solve)
    decided.require_work()
    swaps = swaps_for(model, found.layers, decided.having("replace"), solve=solve)
    return carry_out(
        model,
        decided,
        swaps,
        lambda: (site.name for site in find_sites(model)[1] if site.kind is None),
        around=lambda: _retraced(model),
        copied=_copy,
    )


def make_room(model: keras.Layer, names: Sequence[str]) -> None:
    """Give the linear layers of these names that have no bias one of zeros, for weights to be loaded."""
    if not names:
        return
    layers = {name: layer for name, layer in named_layers(model) if channels_of(layer)}
    new = alike(names, list(layers))
    with _retraced(model):
        for name in names:
            layer = layers.get(new.get(name, name))
            if layer is None:
                raise InputError(f"expected the recipe's layer in front, {name}, received a model without it")
            Absorbed(name, layer, "full").apply(None)


@contextmanager
def layers_by_name(model: keras.Layer) -> Iterator[Mapping[str, keras.Layer]]:
    """Give every layer by name within the context."""
    yield dict(named_layers(model))


class _Found:
    """The sites of a model, the layer of each by name, and what is in front of them, which is looked for once asked."""

    def __init__(self, model: keras.Layer, example: Any) -> None:
        self.model, self.example = model, example
        layers, self.sites = find_sites(model, example)
        self.layers = dict(zip((site.name for site in self.sites), layers, strict=True))

    @cached_property
    def linear(self) -> dict[str, keras.Layer]:
        """The linear layers of the model by name."""
        return {name: layer for name, layer in named_layers(self.model) if channels_of(layer)}

    @cached_property
    def equal_sites(self) -> list[Site]:
        """The sites with what is in front of them."""
        names: dict[int, str] = {}
        for name, layer in named_layers(self.model):
            names.setdefault(id(layer), name)
        todo = {site.name: self.layers[site.name] for site in self.sites if site.kind is None and not site.obstacle}
        fronts = Fronts(
            {id(layer): layer for layer in distinct_layers(self.model)}, {id(layer): layer for layer in todo.values()}
        )
        if todo:
            fronts.look(self.model, self.example)
        return [
            replace(site, **fronts.of(id(todo[site.name]), names)) if site.name in todo else site for site in self.sites
        ]

    def decide(
        self,
        target: Target | Recipe | Rules,
        include: Sequence[str],
        exclude: Sequence[str],
        where: Callable[[keras.Layer, str], bool] | None,
        mode: Mode | None,
        solve: bool = True,
    ) -> Plan:
        """Return the plan for one target."""
        sites = [replace(site, unequal="") for site in self.sites]
        if isinstance(target, Recipe):
            target = renamed(target, list(self.layers))
            if any(choice.front for choice in target.choices):
                sites = self.equal_sites
                target = fronts_of(target, {site.name: site.front for site in sites}, list(self.linear))
                sites = [self._biased(site, target) for site in sites]
        elif mode is not None and (isinstance(target, Rules) or equalizes(target)):
            sites = self.equal_sites
        elif not isinstance(target, Rules) and folds(target):
            pairs = zip(sites, self.equal_sites, strict=True)
            sites = [replace(site, goes_in=found.goes_in) for site, found in pairs]
        return decide(
            "keras",
            sites,
            target,
            include=include,
            exclude=exclude,
            where=None if where is None else lambda name: where(self.layers[name], name),
            mode=mode,
            state_of=lambda name: read_state(self.layers[name]) if solve else None,
            front_of=lambda name: read_front(self.linear[name]) if name in self.linear else None,
        )

    def _biased(self, site: Site, recipe: Recipe) -> Site:
        """Return a site that knows whether the layer which a recipe says is in front has a bias."""
        front = next((self.linear.get(choice.front) for choice in recipe.choices if choice.name == site.name), None)
        return site if front is None else replace(site, front_biased=front.bias is not None)


def _copy(model: keras.Layer) -> keras.Layer:
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedError(
            "expected a model that Keras can save and load, which inplace=False needs, received "
            f"{type(model).__name__}: {error}; patch the model itself, or a copy that your own code makes"
        ) from error
    for new, old in zip(distinct_layers(twin), distinct_layers(model), strict=True):
        new.__dict__.update({mark: old.__dict__[mark] for mark in (MARK, FRONT, BIASED) if mark in old.__dict__})
    return twin


@contextmanager
def _retraced(model: keras.Layer) -> Iterator[None]:
    """Run a body that changes variables, then have every model within and around trace and optimize the new ones."""
    models = [model, *models_around(model)]
    layers = list({id(layer): layer for each in models for layer in distinct_layers(each)}.values())
    optimizers = Optimizers(layers)
    yield
    for layer in layers:
        if isinstance(layer, keras.Model):
            layer.train_function = layer.test_function = layer.predict_function = None
    optimizers.extend()
    for layer in layers:
        if hasattr(layer, "_track_variables"):  # the torch backend lists variables once more
            layer._track_variables()
    for each in models:
        keep_rebuildable(each)
        keep_whole(each)
