"""The norms of a Keras model, and how each becomes a BatchNorm again, in place and reversibly.

As in `swap`, the object stays and only its class and contents change.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops

from ...convert.line import LineFit
from ...convert.recipe import Recipe
from ...convert.state import BatchNormState
from ...convert.targets import BatchNorm, BatchRenorm
from ...errors import spoken
from ...frameworks.keras import build_shape, named_layers, override, overriding, to_numpy
from ...layers import keras as layers
from ..plan import Decision, Site
from ..swap import Swap, become
from .names import renamed
from .patch import _copy, _retraced
from .sites import _dry_run, _spatial, find_sites
from .swap import _KEPT, _REBOUND, FRONT, MARK, _build, read_state
from .swap import BatchNorm as BatchNormLayer

_NORMS = (
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    layers.SwitchNormalization,
    layers.BatchRenormalization,
)
_VALUES = ("gamma", "beta", "moving_mean", "moving_variance")
_STATISTICS = _VALUES[2:]
_SETTINGS = (
    *("epsilon", "activity_regularizer", "trainable", "name"),
    *("gamma_initializer", "gamma_regularizer", "gamma_constraint"),
    *("beta_initializer", "beta_regularizer", "beta_constraint"),
)
_MOVING = ("momentum", "synchronized", "moving_mean_initializer", "moving_variance_initializer")


def find_norms(model: keras.Layer, example: Any = None) -> tuple[list[keras.Layer], list[Site]]:
    """Return the norms of ``model`` and what is known of each, BatchNorms (``kind`` "bn") among them.

    Raises as `find_sites` does, which finds the BatchNorms.
    """
    holders, batch_norms = find_sites(model, example)
    names: dict[int, list[str]] = {}
    norms: dict[int, keras.Layer] = {}
    order: dict[str, int] = {}
    for name, layer in named_layers(model):
        order.setdefault(name, len(order))
        if isinstance(layer, _NORMS):
            names.setdefault(id(layer), []).append(name)
            norms[id(layer)] = layer
    shapes = {} if example is None else _dry_run(model, norms, example)
    found = []
    for key, layer in norms.items():
        obstacle = _obstacle(layer)
        shape: Any = None if obstacle else build_shape(layer)
        axis = -1 if shape is None else channel_axis(layer)
        site = Site(
            name=names[key][0],
            aliases=tuple(names[key][1:]),
            source=type(layer).__name__,
            channels=0 if shape is None else int(shape[axis]),
            spatial=None if shape is None else _spatial(shapes.get(key, shape), axis),
            obstacle=obstacle,
            kind=BatchRenorm.kind if isinstance(layer, layers.BatchRenormalization) else None,
        )
        found.append((layer, site))
    for layer, site in zip(holders, batch_norms, strict=True):
        if id(layer) not in norms:
            found.append((layer, Site(**{**vars(site), "kind": BatchNorm.kind})))
    found.sort(key=lambda pair: order[pair[1].name])
    return [layer for layer, _ in found], [site for _, site in found]


def channel_axis(layer: keras.Layer) -> int:
    """Return the axis of the channels in what a norm takes and returns."""
    axis = layer.axis
    return int(axis if isinstance(axis, int) else axis[0])


def epsilon(layer: keras.Layer) -> float:
    """Return what a norm adds to its variance."""
    return float(layer.epsilon)


def exact_state(layer: keras.Layer) -> BatchNormState | None:
    """Return the BatchNorm that computes what a norm computes at inference, None where no BatchNorm does."""
    exact = isinstance(layer, layers.BatchRenormalization)
    if isinstance(layer, layers.SwitchNormalization) and layer.compat is None and layer.batch_statistics != "none":
        exact = all(float(to_numpy(gates)[-1]) == 1 for gates in layer.gates())
    return read_state(layer) if exact else None


@contextmanager
def by_the_batch(batch_norms: Mapping[str, keras.Layer], seen: Mapping[str, LineFit]) -> Iterator[None]:
    """Have BatchNorms normalize by what they are given within the context, and count that in ``seen``."""
    kept = {name: _read(layer, _STATISTICS) for name, layer in batch_norms.items()}

    def measuring(layer: keras.Layer, fit: LineFit, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            x = np.moveaxis(to_numpy(inputs), channel_axis(layer), -1)
            batch = LineFit()
            batch.add(x, x)
            fit.add(x, x)
            _write(layer, {"moving_mean": batch.mean[0], "moving_variance": batch.moments[0]})
            return run(inputs, *args, **kwargs)

        return call

    try:
        with ExitStack() as stack:
            for name, layer in batch_norms.items():
                stack.callback(override(layer, "call", functools.partial(measuring, layer, seen[name])))
            yield
    finally:
        for name, layer in batch_norms.items():
            _write(layer, kept[name])


def swaps_back(
    model: keras.Layer,
    layers: Mapping[str, keras.Layer],
    decisions: Sequence[Decision],
    state_of: Callable[[str], BatchNormState | None],
) -> list[Swap]:
    """Return what makes the norms of ``model`` BatchNorms as a plan has decided."""
    swaps: list[Swap] = []
    for decision in decisions:
        site, layer = decision.site, layers[decision.site.name]
        state = functools.partial(state_of, site.name)
        remeasured = site.kind == BatchNorm.kind
        swaps.append(_Remeasured(layer, site.name, state) if remeasured else _Back(layer, site.name, state))
    return swaps


def copied(model: keras.Layer) -> keras.Layer:
    """Return a copy of ``model``; raises `UnsupportedError` for one that Keras cannot save and load."""
    return _copy(model)


def around(model: keras.Layer) -> AbstractContextManager[None]:
    """Have every model within trace and optimize the new variables, after a body that changes them."""
    return _retraced(model)


def fitted(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """Return the recipe with the names that Keras made up for this model's layers."""
    return renamed(recipe, names)


class _Back:
    """One norm's BatchNorm, ready to be put in its place and taken out again."""

    compared = True

    def accept(self, found: Any) -> None:
        """Do nothing: a calibration leaves a BatchNorm as it is."""

    def __init__(self, layer: keras.Layer, name: str, state: Callable[[], BatchNormState | None]) -> None:
        self.layer, self.name, self.state = layer, name, state
        self.old_class, self.old_contents = type(layer), dict(layer.__dict__)
        settings = {key: getattr(layer, key) for key in _SETTINGS} | {"dtype": layer.dtype_policy}
        settings |= {key: getattr(layer, key) for key in _MOVING if hasattr(layer, key)}
        self.new = BatchNormLayer(axis=channel_axis(layer), **settings)
        self.before = _read(layer, [name for name in _VALUES if getattr(layer, name, None) is not None])
        self.own_attributes = _attributes(layer)
        _build(self.new, layer)
        self.written: list[Any] = []

    def apply(self) -> None:
        """Put the BatchNorm in place."""
        if (state := self.state()) is not None:
            values = (state.gamma, state.beta, state.mean, state.var)
            _write(self.new, dict(zip(_VALUES, values, strict=True)))
        old, new = self.old_contents, {k: v for k, v in self.new.__dict__.items() if k not in _REBOUND}
        kept = {key: value for key, value in old.items() if key in _KEPT}
        extras = {key: value for key, value in old.items() if key not in self.own_attributes}
        become(self.layer, type(self.new), {**extras, **new, **kept})
        self.written = self.layer.get_weights()

    def trained(self) -> bool:
        """Return whether the BatchNorm has changed since."""
        return not all(map(np.array_equal, self.layer.get_weights(), self.written))

    def as_original(self) -> AbstractContextManager[None]:
        """Have the BatchNorm compute within the context what the norm did, and nothing else changed."""
        shadow = object.__new__(self.old_class)
        shadow.__dict__.update(self.old_contents)
        shadow.__dict__.update({name: ops.convert_to_tensor(value) for name, value in self.before.items()})

        def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return self.old_class.call(shadow, inputs)

        return overriding(self.layer, "call", call)

    def restore(self) -> None:
        """Put the norm back."""
        kept = {key: value for key, value in self.layer.__dict__.items() if key in _KEPT}
        become(self.layer, self.old_class, {**self.old_contents, **kept})
        _write(self.layer, self.before)


class _Remeasured:
    """New moving statistics for a BatchNorm, which stays what it is."""

    compared = True

    def accept(self, found: Any) -> None:
        """Do nothing: a calibration leaves a BatchNorm as it is."""

    def __init__(self, layer: keras.Layer, name: str, state: Callable[[], BatchNormState | None]) -> None:
        self.layer, self.name, self.state = layer, name, state
        self.before = self.written = _read(layer, _STATISTICS)

    def apply(self) -> None:
        """Give the BatchNorm what was measured."""
        if (state := self.state()) is not None:
            _write(self.layer, {"moving_mean": state.mean, "moving_variance": state.var})
        self.written = _read(self.layer, _STATISTICS)

    def trained(self) -> bool:
        """Return whether the statistics have moved since."""
        now = _read(self.layer, _STATISTICS)
        return not all(np.array_equal(now[name], value) for name, value in self.written.items())

    @contextmanager
    def as_original(self) -> Iterator[None]:
        """Run the body with the statistics from before."""
        now = _read(self.layer, _STATISTICS)
        _write(self.layer, self.before)
        try:
            yield
        finally:
            _write(self.layer, now)

    def restore(self) -> None:
        """Give the BatchNorm the statistics it had."""
        _write(self.layer, self.before)


def _obstacle(layer: keras.Layer) -> str:
    cls = type(layer)
    if not any(cls.call is norm.call for norm in _NORMS) or ("call" in layer.__dict__ and MARK not in layer.__dict__):
        return f"{cls.__name__} overrides call: a BatchNorm would lose what it adds"
    if not layer.built:
        return f"not built yet: {spoken('give --input-shape', 'give an example input, or call the model on one first')}"
    if not isinstance(layer.axis, int) and len(layer.axis) > 1:
        return (
            f"a LayerNormalization over positions (axis={list(layer.axis)}) scales each by itself, a BatchNorm only "
            "channels: put a GroupNormalization of one group in its place and train it"
        )
    if getattr(layer, "rms_scaling", False):
        return "rms_scaling=True takes no mean: no BatchNorm follows it"
    return ""


def _read(layer: keras.Layer, names: Sequence[str]) -> dict[str, Any]:
    return {name: np.array(ops.convert_to_numpy(getattr(layer, name))) for name in names}


def _write(layer: keras.Layer, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        getattr(layer, name).assign(value)


def _attributes(layer: keras.Layer) -> frozenset[str]:
    """Name what a norm holds itself and a patch has put on it, so that what a user did can be told and kept."""
    plain = type(layer).from_config(layer.get_config())
    plain.build(build_shape(layer))
    return frozenset(plain.__dict__) | {MARK, FRONT, "call", "_call_signature"}
