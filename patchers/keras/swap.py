"""Turn one BatchNorm layer into its replacement, keeping the object."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import keras
import numpy as np
from keras import ops

from ...convert.carry_over import carry_over
from ...convert.equalize import Equalized, equalize
from ...convert.state import Array, BatchNormState
from ...convert.targets import BatchRenorm, GroupNorm, SwitchNorm
from ...errors import InputError
from ...frameworks.keras import build_shape, named_layers, overriding
from ...layers import keras as layers
from ...layers.keras.statistics import wide
from ..plan import Decision
from ..swap import become
from .equalized import Absorbed
from .fronts import channels_of, read_front
from .strategy import beside

MARK = "_normswap"
"""Attribute of a replaced layer that holds its target's kind."""

FRONT = "_normswap_front"
"""Attribute of a replaced layer that holds the name of the layer in front that is equalized for it."""

BatchNorm = keras.layers.BatchNormalization

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


class Swap:
    """One site's replacement, applied to the layer object itself and reversible.

    ``new`` is an unbuilt layer of the replacing class, which takes over those of the BatchNorm's variables that both
    have. ``values`` gives names of variables the values to write. ``front`` is the layer in front, if that takes a
    scale, and ``found`` what was found for both.
    """

    compared = True

    def __init__(
        self,
        layer: keras.Layer,
        name: str,
        new: keras.Layer,
        kind: str,
        values: dict[str, Array],
        front: Absorbed | None = None,
        found: Equalized | None = None,
    ) -> None:
        self.layer, self.name, self.kind, self.new = layer, name, kind, new
        self.front, self.found = front, found
        self.old_class, self.old_contents = type(layer), dict(layer.__dict__)
        self.old_arguments = [(node, node.arguments) for node in layer._inbound_nodes]
        _build(new, layer)
        self.values = [(getattr(new, variable), value) for variable, value in values.items()]
        written = [getattr(layer, variable, None) for variable in values]
        self.old_values = [(variable, variable.numpy()) for variable in written if variable is not None]
        # A native renorm keeps further averages, which ours would leave behind.
        self.computes_batch_norm = kind == BatchRenorm.kind and not layer.renorm

    def apply(self) -> None:
        """Put the replacement in place."""
        if self.front is not None:
            self.front.apply(self.found)
        for variable, value in self.values:
            variable.assign(value)
        old, new = self.old_contents, {k: v for k, v in self.new.__dict__.items() if k not in _REBOUND}
        kept = {key: value for key, value in old.items() if key in _KEPT}
        extras = {key: value for key, value in old.items() if key not in _own_attributes()}
        marks = {MARK: self.kind, **({FRONT: self.front.name} if self.front else {})}
        become(self.layer, type(self.new), {**extras, **new, **kept, **marks})
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

    def accept(self, found: Equalized | None) -> None:
        """Take what the replacement is now for what it was given, by a calibration that found this."""
        if self.front is not None:
            self.found = found or self.found
            self.front.written = self.front.values()
        self.written = self.layer.get_weights()

    def trained(self) -> bool:
        """Return whether the replacement has changed since into something no BatchNorm computes."""
        if self.front is not None and self.front.trained():
            return True
        same = all(map(np.array_equal, self.layer.get_weights(), self.written))
        return not (same or self.computes_batch_norm)

    def as_original(self) -> AbstractContextManager[None]:
        """Have the replacement compute within the context what its BatchNorm did, and nothing else changed."""
        return overriding(self.layer, "call", self._batch_norm())

    def _batch_norm(self) -> Callable[..., Any]:
        """Return what the BatchNorm that was replaced computes at inference, of an equalized input where it is."""
        if self.found is not None:
            scale, shift = self.found.affine
            return lambda inputs, *args, **kwargs: self._affine(inputs, scale, shift)
        old, written = self.old_contents, {id(variable): value for variable, value in self.old_values}
        mean, var, gamma, beta = (
            None if (variable := old[name]) is None else written.get(id(variable), variable.numpy())
            for name in ("moving_mean", "moving_variance", "gamma", "beta")
        )

        def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            y = ops.batch_normalization(wide(inputs), mean, var, old["axis"], beta, gamma, old["epsilon"])
            return ops.cast(y, self.layer.compute_dtype)

        return call

    def _affine(self, inputs: Any, scale: Array, shift: Array) -> Any:
        x, shape = wide(inputs), [1] * len(inputs.shape)
        shape[self.old_contents["axis"]] = -1
        by_channel = (ops.convert_to_tensor(each.reshape(shape), x.dtype) for each in (scale, shift))
        y = ops.add(ops.multiply(x, next(by_channel)), next(by_channel))
        return ops.cast(y, self.layer.compute_dtype)

    def restore(self) -> None:
        """Put the BatchNorm back."""
        if self.front is not None:
            self.front.restore()
        for variable, value in self.old_values:
            variable.assign(value)
        for node, arguments in self.old_arguments:
            node.arguments = arguments
        kept = {key: value for key, value in self.layer.__dict__.items() if key in _KEPT}
        become(self.layer, self.old_class, {**self.old_contents, **kept})


def swaps_for(
    model: keras.Layer, layers: Mapping[str, keras.Layer], decisions: Sequence[Decision], *, solve: bool = True
) -> list[Swap]:
    """Return what replaces the BatchNorms of ``model``, given by name, as a plan has decided."""
    known = dict(named_layers(model)) if any(decision.front for decision in decisions) else {}
    return [_swap(layers[decision.site.name], decision, _front(known, decision), solve) for decision in decisions]


def _front(layers: Mapping[str, keras.Layer], decision: Decision) -> keras.Layer | None:
    if not decision.front:
        return None
    layer = layers.get(decision.front)
    if layer is None or channels_of(layer) != decision.site.channels:
        raise InputError(
            f"{decision.site.name}: expected the recipe's layer in front, {decision.front}, received a model without it"
        )
    return layer


def _swap(layer: keras.Layer, decision: Decision, front: keras.Layer | None, solve: bool) -> Swap:
    """Return what replaces a BatchNorm by a plan's decision, its values carried over or, with a front, equalized."""
    target, name = decision.target, decision.site.name
    assert target is not None
    found = None if front is None else _equalized(layer, decision, front, solve)
    absorbs = None if front is None else Absorbed(decision.front, front, decision.mode)
    settings = {key: getattr(layer, key) for key in _AFFINE} | {"dtype": layer.dtype_policy}
    new: keras.Layer
    if isinstance(target, GroupNorm):
        new = keras.layers.GroupNormalization(target.groups, **settings)
        values = _values(layer, decision, found)
        return Swap(layer, name, new, target.kind, values, absorbs, found)
    settings |= {key: getattr(layer, key) for key in _MOVING}
    if isinstance(target, SwitchNorm):
        if target.compat is not None:
            raise InputError(f"{name}: expected compat=None for a Keras model, received compat={target.compat!r}")
        new = layers.SwitchNormalization(batch_statistics=target.batch_statistics, **settings)
        values = _values(layer, decision, found)
        if found is not None and target.batch_statistics != "none":
            values |= {"moving_mean": found.mean, "moving_variance": found.var}
        return Swap(layer, name, new, target.kind, values, absorbs, found)
    assert isinstance(target, BatchRenorm)  # the way back has swaps of its own
    settings |= {"center": layer.center, "scale": layer.scale}
    new = layers.BatchRenormalization(r_max=target.r_max, d_max=target.d_max, **settings)
    return Swap(layer, name, new, target.kind, {})


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


def _build(new: keras.Layer, layer: keras.Layer) -> None:
    """Build ``new`` for the input of ``layer``, with those of its variables that both have."""
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
    with beside(layer.variables):
        new.build(build_shape(layer))
    del new.__dict__["add_weight"]


def _equalized(layer: keras.Layer, decision: Decision, front: keras.Layer, solve: bool) -> Equalized:
    """Return what a norm and the layer in front of it become."""
    target, site, state = decision.target, decision.site, read_state(layer)
    assert isinstance(target, GroupNorm | SwitchNorm)
    assert decision.mode is not None
    if problems := state.problems():
        problem = f"expected finite parameters and variances >= 0, received {'; '.join(problems)}"
        raise InputError(f"{site.name}: {problem}")
    groups = target.groups if isinstance(target, GroupNorm) and isinstance(target.groups, int) else None
    seen = read_front(front)
    return equalize(state, target, seen, groups=groups, spatial=site.spatial, mode=decision.mode, solve=solve)


def _values(layer: keras.Layer, decision: Decision, found: Equalized | None) -> dict[str, Array]:
    """Return the value of each variable that equalizing has found or the carry-over determines."""
    target, site = decision.target, decision.site
    assert target is not None
    groups = target.groups if isinstance(target, GroupNorm) and isinstance(target.groups, int) else None
    carried: Any = found
    if found is None:
        try:
            carried = carry_over(read_state(layer), target, groups=groups, spatial=site.spatial)
        except InputError as error:
            raise InputError(f"{site.name}: {error}") from None
    values = {"gamma": carried.gamma, "beta": carried.beta}
    if carried.gate_logits is not None:
        values |= {"mean_weight": carried.gate_logits, "var_weight": carried.gate_logits}
    return values


@cache
def _own_attributes() -> frozenset[str]:
    """Name what a BatchNormalization holds itself, so that what a user put on one can be told and kept."""
    plain = BatchNorm(renorm=True, name="plain")
    plain.build((None, 1))
    return frozenset(plain.__dict__)
