"""Weights given to a patched Keras model."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from ..errors import InputError, spoken
from ..frameworks.keras import distinct_layers
from ..layers.keras import BatchRenormalization, SwitchNormalization
from ..sources.misfit import misfit
from ..sources.weights import load_weights
from .arrays import Array, require_eps, require_none
from .checkpoint import Checkpoint
from .keras_h5 import KerasWeights, LayerWeights

_KINDS = {SwitchNormalization: "sn", BatchRenormalization: "brn", keras.layers.GroupNormalization: "gn"}
_EPS = {"sn": (1e-3, 1e-5), "brn": (1e-3, 1e-5), "gn": (1e-6,)}
"""Those that each system's code has, or had before, or uses in its experiments."""

_PARTS = ("gamma", "beta", "mean_weight", "var_weight", "moving_mean", "moving_variance")
_NEUTRAL = {"gamma": 1.0, "beta": 0.0}
"""What a layer without a scale or center computes with."""

_NUMBERED = re.compile(r"(.*?)(?:_(\d+))?")
_OLDER = {f"convolution{rank}d": f"conv{rank}d" for rank in (1, 2, 3)} | {"batchnormalization": "batch_normalization"}
"""What Keras 1 called layers that it numbered, by their later names."""

_OWN_NORMS = {"batch_normalization", "switch_normalization", "batch_renormalization", "group_normalization"}
_THEIR_NORMS = _OWN_NORMS | {base.replace("_", "") for base in _OWN_NORMS}


def norms_of(model: keras.Layer) -> dict[str, str]:
    """Return the kind ("sn", "brn", "gn") of every replaced layer by its path."""
    return {layer.path: _KINDS[type(layer)] for layer in distinct_layers(model) if type(layer) in _KINDS}


def load(model: keras.Model, checkpoint: Checkpoint, eps: float | None) -> tuple[int, int]:
    """Load the weights whole or not at all, and return how many norms and how many other layers got some."""
    if checkpoint.layers is None:
        return _load_own(model, checkpoint)
    own = _by_name(model)
    fit = _Fit(own, checkpoint.layers)
    if fit.missing or fit.unexpected or fit.shapes:
        raise misfit(str(checkpoint.path), fit.missing, fit.unexpected, fit.shapes)
    norms = {name: layer for name, layer in own.items() if type(layer) in _KINDS}
    configs = {name: checkpoint.layers.configs.get(fit.names[name], {}) for name in norms}
    _require_groups(norms, configs)
    require_eps({name: (layer.epsilon, _trained(layer, configs[name], eps)) for name, layer in norms.items()})
    for variable, value in fit.values:
        variable.assign(value)
    return len(norms), len(own) - len(norms)


def _by_name(model: keras.Layer) -> dict[str, keras.Layer]:
    layers = [layer for layer in getattr(model, "layers", model._layers) if layer.weights]
    own = {layer.name: layer for layer in layers}
    if len(own) < len(layers):
        twice = next(layer.name for layer in layers if own[layer.name] is not layer)
        raise InputError(f"expected layers of different names in the model, received {twice} twice; name them apart")
    return own


def _load_own(model: keras.Model, checkpoint: Checkpoint) -> tuple[int, int]:
    before = model.get_weights()
    try:
        load_weights(model, checkpoint.path)
    except InputError:
        model.set_weights(before)  # Keras has stopped in the middle
        raise
    layers = [layer for layer in distinct_layers(model) if not layer._layers and layer.weights]
    norms = sum(type(layer) in _KINDS for layer in layers)
    return norms, len(layers) - norms


class _Fit:
    """Which layer of a file each of the model's is (``names``), its ``values`` by variable, and all that does not fit.

    Layers of one name are the same one. Where Keras numbered a kind of layers on both sides, though from another number
    on or under another name, they are the same in the order of numbers, which is that of their making.
    """

    def __init__(self, own: Mapping[str, keras.Layer], theirs: KerasWeights) -> None:
        theirs_with_weights = {name: weights for name, weights in theirs.items() if weights.arrays}
        self.names: dict[str, str] = {}
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.shapes: list[str] = []
        self.values: list[tuple[Any, Array]] = []
        self._match(own, theirs_with_weights)
        for name, other in self.names.items():
            layer, weights = own[name], theirs_with_weights[other]
            if type(layer) in _KINDS:
                self._fit_norm(layer, other, weights)
            else:
                self._fit_other(layer, other, weights)

    def _match(self, own: Mapping[str, keras.Layer], theirs: Mapping[str, LayerWeights]) -> None:
        numbered = {_snake_case(type(layer).__name__) for layer in own.values() if type(layer) not in _KINDS}
        families: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
        for name, layer in own.items():
            kind = _KINDS.get(type(layer))
            family, number = _placed(name, kind, _OWN_NORMS if kind else {_snake_case(type(layer).__name__)})
            families.setdefault(family, ({}, {}))[0][name] = number
        for name, weights in theirs.items():
            kind = None if weights.kind == "other" else weights.kind
            family, number = _placed(name, kind, _THEIR_NORMS if kind else numbered)
            families.setdefault(family, ({}, {}))[1][name] = number
        for ours, others in families.values():
            if ours.keys() != others.keys() and len(ours) == len(others):
                self.names |= zip(
                    sorted(ours, key=ours.__getitem__), sorted(others, key=others.__getitem__), strict=True
                )
            else:
                self.names |= {name: name for name in ours if name in others}
                self.missing += [name for name in ours if name not in others]
                self.unexpected += [name for name in others if name not in ours]

    def _fit_norm(self, layer: keras.Layer, other: str, weights: LayerWeights) -> None:
        variables = {part: variable for part in _PARTS if (variable := getattr(layer, part, None)) is not None}
        self.unexpected += [f"{other}/{part}" for part in weights.arrays if part not in variables]
        for part, variable in variables.items():
            if part in weights.arrays:
                self._put(f"{layer.name}/{part}", variable, weights.arrays[part])
            elif part in _NEUTRAL:
                self.values.append((variable, np.full(variable.shape, _NEUTRAL[part], np.float32)))
            else:
                self.missing.append(f"{layer.name}/{part}")
        if isinstance(layer, SwitchNormalization):
            self.values.append((layer.temperature, np.ones((), np.float32)))

    def _fit_other(self, layer: keras.Layer, other: str, weights: LayerWeights) -> None:
        """Take a layer's weights by their names, or by place where Keras 1 had others."""
        variables = {variable.name: variable for variable in layer.weights}
        found = {name.rpartition("/")[2].partition(":")[0]: array for name, array in weights.arrays.items()}
        if len(variables) < len(layer.weights):
            raise InputError(
                f"expected layers that hold no others, received {layer.name}; load its weights by themselves"
            )
        if not found.keys() & variables.keys() and len(weights.arrays) == len(variables):
            found = dict(zip(variables, weights.arrays.values(), strict=True))
        self.missing += [f"{layer.name}/{name}" for name in variables if name not in found]
        self.unexpected += [f"{other}/{name}" for name in found if name not in variables]
        for name, variable in variables.items():
            if name in found:
                self._put(f"{layer.name}/{name}", variable, found[name])

    def _put(self, where: str, variable: Any, value: Array) -> None:
        if tuple(variable.shape) == value.shape:
            self.values.append((variable, value))
        else:
            self.shapes.append(f"{where}: {tuple(variable.shape)} in the model, {value.shape} in the file")


def _placed(name: str, kind: str | None, numbered: Collection[str]) -> tuple[str, int]:
    """Return among which layers one is to be looked for, and its place there: alone under a name that people gave."""
    match = _NUMBERED.fullmatch(name)
    assert match is not None
    base = match[1] if kind else _OLDER.get(match[1], match[1])
    return (kind or base, int(match[2] or 0)) if base in numbered else (f"={name}", 0)


def _snake_case(name: str) -> str:
    """Return what Keras calls a layer of a class before it numbers it."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()


def _trained(layer: keras.Layer, config: Mapping[str, Any], eps: float | None) -> Sequence[float]:
    told = config.get("epsilon") if eps is None else eps
    if told is None:
        return _EPS[_KINDS[type(layer)]]
    if not isinstance(told, float | int):
        raise InputError(f"expected a number as epsilon of {layer.name} in the file, received epsilon={told!r}")
    return (told,)


def _require_groups(norms: Mapping[str, keras.Layer], configs: Mapping[str, Mapping[str, Any]]) -> None:
    groups = {name: (getattr(layer, "groups", None), configs[name].get("group")) for name, layer in norms.items()}
    require_none(
        [
            f"{name}: {n} in the model, {told} in the file"
            for name, (n, told) in groups.items()
            if told not in (None, n)
        ],
        "expected the file's number of groups, received another; patch with "
        + spoken("--groups", "GroupNorm(groups=...)"),
    )
