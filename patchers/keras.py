"""Find, plan and replace the BatchNorms of a Keras model.

A site keeps its identity: the layer object stays and only its class and contents change. Graphs, shared
layers and custom code that holds the layer work on without being rebuilt, in models of every kind.
"""

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from ..convert.carry_over import Array, BatchNormState, carry_over
from ..convert.recipe import Recipe
from ..convert.targets import BatchRenorm, GroupNorm, SwitchNorm, Target
from ..errors import InputError, UnsupportedError
from ..layers import keras as layers
from .keras_walk import call, distinct_layers, named_layers, watching
from .plan import Decision, Plan, Report, Site, decide
from .swap import carry_out

MARK = "_normswap"
"""Attribute of a replaced layer that holds its target's kind."""

_BatchNorm = keras.layers.BatchNormalization
_KINDS = {layers.SwitchNormalization: SwitchNorm.kind, layers.BatchRenormalization: BatchRenorm.kind}
_AFFINE = {
    *("axis", "epsilon", "activity_regularizer", "trainable", "name"),
    *("gamma_initializer", "gamma_regularizer", "gamma_constraint"),
    *("beta_initializer", "beta_regularizer", "beta_constraint"),
}
_MOVING = _AFFINE | {"momentum", "synchronized", "moving_mean_initializer", "moving_variance_initializer"}
_KEPT = {
    *("name", "activity_regularizer", "_dtype_policy", "_trainable", "_path", "_parent_path", "_remat_mode"),
    *("_inbound_nodes", "_outbound_nodes", "_called", "_losses", "_loss_ids", "_losses_override"),
}
_REBOUND = {"build", "quantize"}  # closures over the object that Keras made them for
_Shape = Sequence[int | None]


def plan(
    model: keras.Layer,
    target: Target | Recipe,
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[keras.Layer, str], bool] | None = None,
) -> Plan:
    """Return what `patch` would do to ``model``, touching nothing; an example may build what is unbuilt."""
    found, sites = find_sites(model, example)
    by_name = dict(zip((site.name for site in sites), found, strict=True))
    selected = None if where is None else lambda name: where(by_name[name], name)
    return decide("keras", sites, target, include=include, exclude=exclude, where=selected)


def patch(
    model: keras.Layer,
    target: Target | Recipe,
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
    decided = plan(model, target, example=example, include=include, exclude=exclude, where=where)
    decided.require_work()
    chosen = decided.having("replace")
    by_name = {site.name: layer for layer, site in zip(*find_sites(model), strict=True)}
    swaps = [_Swap(by_name[decision.site.name], decision) for decision in chosen]
    return carry_out(
        model,
        decided,
        swaps,
        lambda: (site.name for site in find_sites(model)[1] if site.kind is None),
        around=lambda: _retraced(model),
    )


def find_sites(model: keras.Layer, example: Any = None) -> tuple[list[keras.Layer], list[Site]]:
    """Return the BatchNorm layers of ``model``, patched ones included, and what is known of each.

    Shapes come from a dry run on ``example``, or from what each layer was built for where that is all known.
    """
    names: dict[int, list[str]] = {}
    found: dict[int, keras.Layer] = {}
    for name, layer in named_layers(model):
        if isinstance(layer, _BatchNorm) or _kind(layer) is not None:
            names.setdefault(id(layer), []).append(name)
            found[id(layer)] = layer
    seen = {} if example is None else _dry_run(model, found, example)
    sites = []
    for key, layer in found.items():
        shape = _build_shape(layer)
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


def mark(model: keras.Layer, recipe: Recipe) -> None:
    """Mark the replaced layers of a loaded model, since a GroupNorm does not tell that it was a BatchNorm.

    Raises `InputError` if a layer of the recipe is not there or is a BatchNorm again.
    """
    found = dict(named_layers(model))
    for choice in recipe.choices:
        layer = found.get(choice.name)
        if layer is None or isinstance(layer, _BatchNorm):
            kind = "no such layer" if layer is None else type(layer).__name__
            raise InputError(
                f"expected {choice.name} to be {choice.target.kind} in the bundle's model, received {kind}"
            )
        layer.__dict__[MARK] = choice.target.kind


def read_state(layer: keras.Layer) -> BatchNormState:
    """Return a BatchNorm's parameters and moving statistics in float64."""

    def read(variable: Any) -> Array:
        return np.asarray(variable.numpy(), np.float64)

    mean = read(layer.moving_mean)
    return BatchNormState(
        gamma=np.ones_like(mean) if layer.gamma is None else read(layer.gamma),
        beta=np.zeros_like(mean) if layer.beta is None else read(layer.beta),
        mean=mean,
        var=read(layer.moving_variance),
        eps=float(layer.epsilon),
    )


class _Swap:
    """One site's replacement, applied to the layer object itself and reversible."""

    def __init__(self, layer: keras.Layer, decision: Decision) -> None:
        assert decision.target is not None
        self.layer, self.name, self.kind = layer, decision.site.name, decision.target.kind
        self.old_class, self.old_contents = type(layer), dict(layer.__dict__)
        self.old_arguments = [(node, node.arguments) for node in layer._inbound_nodes]
        self.new = _build(layer, decision.target)
        exact = isinstance(decision.target, BatchRenorm)
        self.values = [] if exact else _values(self.new, layer, decision)
        kept = [] if exact else [v for v in (layer.gamma, layer.beta) if v is not None]
        self.old_values = [(variable, variable.numpy()) for variable in kept]
        # A native renorm keeps further averages, which ours would leave behind.
        self.computes_batch_norm = exact and not layer.renorm

    def apply(self) -> None:
        for variable, value in self.values:
            variable.assign(value)
        old, new = self.old_contents, {k: v for k, v in self.new.__dict__.items() if k not in _REBOUND}
        kept = {key: value for key, value in old.items() if key in _KEPT}
        extras = {key: value for key, value in old.items() if key not in _own_attributes()}
        self._set(type(self.new), {**extras, **new, **kept, MARK: self.kind})
        if self.kind == GroupNorm.kind:
            self._take_batch_norm_arguments()
        self.written = self.layer.get_weights()

    def _take_batch_norm_arguments(self) -> None:
        """Let graphs and code go on passing a mask, which a GroupNormalization does not take."""
        for node, arguments in self.old_arguments:
            kept = {k: v for k, v in arguments.kwargs.items() if k not in ("mask", "training")}
            node.arguments = type(arguments)(*arguments.args[:1], **kept)
        run = self.layer.call

        def call(inputs: Any, **ignored: Any) -> Any:
            return run(inputs)

        self.layer.__dict__.update(call=call, _call_signature=inspect.signature(call))

    def trained(self) -> bool:
        same = all(map(np.array_equal, self.layer.get_weights(), self.written))
        return not (same or self.computes_batch_norm)

    def restore(self) -> None:
        for variable, value in self.old_values:
            variable.assign(value)
        for node, arguments in self.old_arguments:
            node.arguments = arguments
        kept = {key: value for key, value in self.layer.__dict__.items() if key in _KEPT}
        self._set(self.old_class, {**self.old_contents, **kept})

    def _set(self, cls: type[keras.Layer], contents: dict[str, Any]) -> None:
        self.layer.__dict__.clear()
        self.layer.__dict__.update(contents)
        self.layer.__class__ = cls


def _build(layer: keras.Layer, target: Target) -> keras.Layer:
    """Return the built replacement of ``layer``, which shares those of its variables that both have."""
    names = _AFFINE if isinstance(target, GroupNorm) else _MOVING
    settings = {name: getattr(layer, name) for name in names} | {"dtype": layer.dtype_policy}
    if isinstance(target, GroupNorm):
        new = keras.layers.GroupNormalization(target.groups, **settings)
    elif isinstance(target, SwitchNorm):
        new = layers.SwitchNormalization(batch_statistics=target.batch_statistics, **settings)
    else:
        settings |= {"center": layer.center, "scale": layer.scale}
        new = layers.BatchRenormalization(r_max=target.r_max, d_max=target.d_max, **settings)
    new._parent_path = layer._parent_path

    create = new.add_weight

    def add_weight(*args: Any, name: str, trainable: bool = True, **kwargs: Any) -> Any:
        variable = getattr(layer, name, None)
        if variable is None:
            return create(*args, name=name, trainable=trainable, **kwargs)
        flag, variable.trainable = variable.trainable, trainable  # the layer files it by this flag
        new._track_variable(variable)
        variable.trainable = flag
        return variable

    new.__dict__["add_weight"] = add_weight
    new.build(_build_shape(layer))
    del new.__dict__["add_weight"]
    return new


def _values(new: keras.Layer, old: keras.Layer, decision: Decision) -> list[tuple[Any, Array]]:
    """Return each variable of the replacement that the carry-over determines, with its value."""
    target, site = decision.target, decision.site
    assert target is not None
    state = read_state(old)
    groups = target.groups if isinstance(target, GroupNorm) and isinstance(target.groups, int) else None
    try:
        carried = carry_over(state, target, groups=groups, spatial=site.spatial)
    except InputError as error:
        raise InputError(f"{site.name}: {error}") from None
    values = [(new.gamma, carried.gamma), (new.beta, carried.beta)]
    if carried.gate_logits is not None:
        values += [(new.mean_weight, carried.gate_logits), (new.var_weight, carried.gate_logits)]
    return values


def _kind(layer: keras.Layer) -> str | None:
    return layer.__dict__.get(MARK) or _KINDS.get(type(layer))


def _obstacle(layer: keras.Layer, shape: _Shape | None) -> str:
    if _kind(layer) is not None:
        return ""
    if type(layer).call is not _BatchNorm.call or "call" in layer.__dict__:
        return f"{type(layer).__name__} overrides call: a replacement would lose what it adds"
    if shape is None:
        return "not built yet: give an example input, or call the model on one first"
    if layer.axis % len(shape) == 0:
        return f"it normalizes along the batch (axis={layer.axis})"
    return ""


def _build_shape(layer: keras.Layer) -> _Shape | None:
    shape: _Shape | None = (layer.get_build_config() or {}).get("input_shape") if layer.built else None
    return shape


def _spatial(shape: _Shape | None, axis: int) -> tuple[int, ...] | None:
    """Return the sizes of ``shape`` but batch and channels, None where one of them is unknown."""
    if shape is None:
        return None
    sizes = [size for i, size in enumerate(shape) if i not in (0, axis % len(shape))]
    return None if None in sizes else tuple(size for size in sizes if size is not None)


def _dry_run(model: keras.Layer, watched: Mapping[int, keras.Layer], example: Any) -> dict[int, _Shape]:
    seen: dict[int, _Shape] = {}
    try:
        with watching(watched, lambda key, inputs, _: seen.setdefault(key, tuple(inputs.shape))):
            call(model, example)
    except Exception as error:
        message = f"expected an example the model accepts, received one on which it fails: {error}"
        raise InputError(message) from error
    return seen


def _own_attributes() -> set[str]:
    """Name what a BatchNormalization holds itself, so that what a user put on one can be told and kept."""
    plain = _BatchNorm(renorm=True, name="plain")
    plain.build((None, 1))
    return set(plain.__dict__)


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
