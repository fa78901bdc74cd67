"""Find, plan and replace the BatchNorms of a Keras model.

A site keeps its identity: the layer object stays and only its class and contents change. Graphs, shared
layers and custom code that holds the layer work on without being rebuilt, in models of every kind.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras

from ..convert.recipe import Recipe, Rules
from ..convert.targets import BatchRenorm, SwitchNorm, Target
from ..errors import InputError, UnsupportedError
from ..layers import keras as layers
from . import keras_drift
from .keras_names import renamed
from .keras_saving import keep_rebuildable
from .keras_swap import MARK, BatchNorm, Shape, build_shape, read_state, swap_for
from .keras_walk import call, distinct_layers, named_layers, watching
from .plan import Plan, Report, Site, decide
from .swap import carry_out

__all__ = ["MARK", "find_sites", "mark", "patch", "plans", "read_state"]

_KINDS = {layers.SwitchNormalization: SwitchNorm.kind, layers.BatchRenormalization: BatchRenorm.kind}


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
    swaps = [swap_for(found.layers[decision.site.name], decision) for decision in decided.having("replace")]
    return carry_out(
        model,
        decided,
        swaps,
        lambda: (site.name for site in find_sites(model)[1] if site.kind is None),
        keras_drift,
        around=lambda: _retraced(model),
    )


def find_sites(model: keras.Layer, example: Any = None) -> tuple[list[keras.Layer], list[Site]]:
    """Return the BatchNorm layers of ``model``, patched ones included, and what is known of each.

    Shapes come from a dry run on ``example``, or from what each layer was built for where that is all known. What is
    not built is built on the example first, since it may hold layers only then.
    """
    if example is not None and not all(layer.built for layer in distinct_layers(model)):
        _dry_run(model, {}, example)
    names: dict[int, list[str]] = {}
    found: dict[int, keras.Layer] = {}
    for name, layer in named_layers(model):
        if isinstance(layer, BatchNorm) or _kind(layer) is not None:
            names.setdefault(id(layer), []).append(name)
            found[id(layer)] = layer
    seen = {} if example is None else _dry_run(model, found, example)
    sites = []
    for key, layer in found.items():
        shape = build_shape(layer)
        sites.append(
            Site(
                name=names[key][0],
                aliases=tuple(names[key][1:]),
                source=type(layer).__name__,
                channels=0 if shape is None else int(shape[layer.axis]),
                spatial=_spatial(seen.get(key, shape), layer.axis),
                obstacle=_obstacle(layer, shape),
                kind=_kind(layer),
            )
        )
    return list(found.values()), sites


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


def mark(model: keras.Layer, recipe: Recipe) -> None:
    """Mark the replaced layers of a loaded model, since a GroupNorm does not tell that it was a BatchNorm.

    Raises `InputError` if a layer of the recipe is not there or is a BatchNorm again.
    """
    found = dict(named_layers(model))
    for choice in recipe.choices:
        layer = found.get(choice.name)
        if layer is None or isinstance(layer, BatchNorm):
            kind = "no such layer" if layer is None else type(layer).__name__
            raise InputError(
                f"expected {choice.name} to be {choice.target.kind} in the bundle's model, received {kind}"
            )
        layer.__dict__[MARK] = choice.target.kind


def _kind(layer: keras.Layer) -> str | None:
    return layer.__dict__.get(MARK) or _KINDS.get(type(layer))


def _obstacle(layer: keras.Layer, shape: Shape | None) -> str:
    if _kind(layer) is not None:
        return ""
    if type(layer).call is not BatchNorm.call or "call" in layer.__dict__:
        return f"{type(layer).__name__} overrides call: a replacement would lose what it adds"
    if shape is None:
        return "not built yet: give an example input, or call the model on one first"
    if layer.axis % len(shape) == 0:
        return f"it normalizes along the batch (axis={layer.axis})"
    return ""


def _spatial(shape: Shape | None, axis: int) -> tuple[int, ...] | None:
    """Return the sizes of ``shape`` but batch and channels, None where one of them is unknown."""
    if shape is None:
        return None
    sizes = [size for i, size in enumerate(shape) if i not in (0, axis % len(shape))]
    return None if None in sizes else tuple(size for size in sizes if size is not None)


def _dry_run(model: keras.Layer, watched: Mapping[int, keras.Layer], example: Any) -> dict[int, Shape]:
    seen: dict[int, Shape] = {}
    try:
        with watching(watched, lambda key, inputs, _: seen.setdefault(key, tuple(inputs.shape))):
            call(model, example)
    except Exception as error:
        message = f"expected an example the model accepts, received one on which it fails: {error}"
        raise InputError(message) from error
    return seen


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
