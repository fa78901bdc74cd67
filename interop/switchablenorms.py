"""Checkpoints of switchablenorms/Switchable-Normalization, read into our names and shapes and written back.

NumPy only. Gates are ordered instance, layer, batch throughout.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..convert.gates import CLOSED_GATE
from ..errors import InputError
from .arrays import Array, Parts, Shapes, expect_shapes, expect_values, require_none

_GATES = ("mean_weight", "var_weight")
_RUNNING = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"
_TEMPERATURE = "temperature"
_PARTS = ("weight", "bias", *_GATES, *_RUNNING, _COUNTER, _TEMPERATURE)
_DIMENSIONS_OF_RANK = {2: 1, 4: 2, 5: 3}
_ROUNDING = 1e-5
"""How far below 0, relative to E[x²], rounding alone can push the variance taken from float32 sums."""


def is_switchablenorms(state: Mapping[str, Any]) -> bool:
    """Return whether ``state``, of arrays or tensors, holds a SwitchNorm as switchablenorms shapes it.

    Its gamma is of rank 2 or more.
    """
    return any("weight" in parts and parts["weight"].ndim > 1 for parts in _layers(state).values())


def dimensions_of(state: Parts) -> dict[str, int]:
    """Return the dimensions, 1, 2 or 3, that each SwitchNorm layer of a switchablenorms state dict is for, by name."""
    layers = {stem.removesuffix("."): parts for stem, parts in _layers(state).items()}
    ranks = {name: parts["weight"].ndim for name, parts in layers.items() if "weight" in parts}
    return {name: _DIMENSIONS_OF_RANK[rank] for name, rank in ranks.items() if rank in _DIMENSIONS_OF_RANK}


def from_switchablenorms(state: Parts, *, batches: int | None = None) -> dict[str, Array]:
    """Return a switchablenorms state dict under its own names, with its SwitchNorm layers in our shapes.

    Such a layer is what holds ``mean_weight`` or ``var_weight``. Weight and bias, (1, C), (1, C, 1, 1) or
    (1, C, 1, 1, 1), and running statistics, (1, C) or (1, C, 1), become (C,); ``num_batches_tracked`` 0 is added.
    Gates stay (3,), or (2,) without batch statistics; a 1d layer's two, [layer, batch], get a closed instance gate.
    A ``module.`` before every name is taken off, and all other entries stay as they are.

    A batch average in the making holds sums of mean and E[x²] over ``batches`` (50 to 200) batches. The file does not
    tell it from a moving average: give the number to take mean = sum / batches and var = sum / batches - mean².

    Raises `InputError` without such a layer, and for those (ten are listed) of which an array is missing,
    unexpected, of another shape, not finite or a negative variance.

    Source: switchablenorms/Switchable-Normalization, names and shapes.
    """
    if batches is not None and batches < 1:
        raise InputError(f"expected `batches` of at least 1, received batches={batches}")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): array for name, array in state.items()}
    return _convert(state, lambda _, parts: _from_published(parts, batches), "as switchablenorms saves it")


def to_switchablenorms(state: Parts, *, dimensions: int | Mapping[str, int] = 2, prefix: str = "") -> dict[str, Array]:
    """Return what `from_switchablenorms` was given, to the last bit, with ``prefix`` before every name.

    ``dimensions`` is 1, 2 or 3, for all layers or by layer name. A 1d layer's instance gate joins its layer gate:
    on (N, C) input that is the same function. Their layers have no temperature: it goes into the logits.

    Raises `InputError` as `from_switchablenorms` does, and for a layer without dimensions.

    Source: switchablenorms/Switchable-Normalization, names and shapes.
    """
    of = dimensions if isinstance(dimensions, Mapping) else dict.fromkeys(map(_layer, _layers(state)), dimensions)
    converted = _convert(state, lambda layer, parts: _to_published(parts, of.get(layer)), "in normswap's shapes")
    return {f"{prefix}{name}": array for name, array in converted.items()}


def _layers(state: Mapping[str, Any]) -> dict[str, Parts]:
    """Return the parts of each SwitchNorm layer by its stem: what comes before a part's name, as in ``layer1.sn.``."""
    stems = dict.fromkeys(
        name.removesuffix(part) for name in state for part in _GATES if f".{name}".endswith(f".{part}")
    )
    return {stem: {part: state[stem + part] for part in _PARTS if stem + part in state} for stem in stems}


def _layer(stem: str) -> str:
    return stem.removesuffix(".") or "(root)"


def _convert(state: Parts, convert: Callable[[str, Parts], Parts], expected: str) -> dict[str, Array]:
    """Return ``state`` with each layer converted, or raise one `InputError` for all that cannot be."""
    result, problems, layers = dict(state), [], _layers(state)
    if not layers:
        raise InputError(f"expected a SwitchNorm layer, received {len(state)} names of which none ends in mean_weight")
    for stem, parts in layers.items():
        try:
            converted = convert(_layer(stem), parts)
        except InputError as error:
            problems.append(f"{_layer(stem)}: {error}")
        else:
            for part in (_COUNTER, _TEMPERATURE):
                result.pop(stem + part, None)
            result |= {stem + part: array for part, array in converted.items()}
    require_none(
        problems,
        f"expected every SwitchNorm layer {expected}, received {len(problems)} of {len(layers)} that are not; "
        "use a whole checkpoint",
    )
    return result


def _from_published(parts: Parts, batches: int | None) -> Parts:
    weight = parts.get("weight")
    if weight is None or weight.ndim not in _DIMENSIONS_OF_RANK:
        found = "missing" if weight is None else f"of shape {weight.shape}"
        raise InputError(f"weight is {found} instead of (1, C), (1, C, 1, 1) or (1, C, 1, 1, 1)")
    dimensions = _DIMENSIONS_OF_RANK[weight.ndim]
    shapes = _shapes(dimensions, weight.shape[1], dimensions == 1 or _has_batch_gate(parts))
    expect_shapes(parts, shapes)
    own = {part: array.reshape(-1) for part, array in parts.items()}
    if batches is not None and "running_mean" in own:
        own |= _average(own["running_mean"], own["running_var"], batches)
    expect_values(own)
    if dimensions == 1:
        own |= {gate: np.concatenate([own[gate][:1] + CLOSED_GATE, own[gate]]) for gate in _GATES}
    return own | ({_COUNTER: np.zeros((), np.int64)} if "running_mean" in own else {})


def _to_published(parts: Parts, dimensions: int | None) -> Parts:
    if dimensions is None or dimensions not in _DIMENSIONS_OF_RANK.values():
        raise InputError(f"`dimensions` is {dimensions} instead of 1, 2 or 3")
    own = {part: array for part, array in parts.items() if part not in (_COUNTER, _TEMPERATURE)}
    if (temperature := float(parts.get(_TEMPERATURE, np.ones(())))) != 1:
        own |= {gate: _tempered(own[gate], temperature) for gate in _GATES if gate in own}
    channels, moving = own["weight"].size if "weight" in own else 0, dimensions == 1 or _has_batch_gate(own)
    expect_shapes(own, _shapes(0, channels, moving))
    expect_values(own)
    if dimensions == 1:
        own |= {gate: _join_instance_gate(own[gate]) for gate in _GATES}
    return {part: own[part].reshape(shape) for part, shape in _shapes(dimensions, channels, moving).items()}


def _tempered(logits: Array, temperature: float) -> Array:
    """Return the logits that give at temperature 1 the gates that these give at another; 0 takes the largest alone."""
    if temperature > 0:
        return np.asarray(logits / temperature, logits.dtype)
    return np.where(np.arange(logits.size) == logits.argmax(), 0, CLOSED_GATE).astype(logits.dtype)


def _has_batch_gate(parts: Parts) -> bool:
    return next(parts[gate].size for gate in _GATES if gate in parts) != 2


def _shapes(dimensions: int, channels: int, moving: bool) -> Shapes:
    """Return the shapes of a published layer of 1, 2 or 3 dimensions, or of ours for 0."""
    affine = {0: (channels,), 1: (1, channels)}.get(dimensions, (1, channels, *[1] * dimensions))
    gates = (3,) if moving and dimensions != 1 else (2,)
    running = dict.fromkeys(_RUNNING, affine[:3]) if moving else {}
    return {"weight": affine, "bias": affine, **dict.fromkeys(_GATES, gates), **running}


def _join_instance_gate(logits: Array) -> Array:
    instance, layer, batch = logits
    joined = layer if instance - layer < CLOSED_GATE / 2 else np.logaddexp(instance, layer)
    return np.array([joined, batch], logits.dtype)


def _average(mean_sum: Array, square_sum: Array, batches: int) -> Parts:
    mean, square = mean_sum.astype(np.float64) / batches, square_sum.astype(np.float64) / batches
    var = square - mean**2
    var = np.where(var < -_ROUNDING * square, var, np.maximum(var, 0))
    return {"running_mean": mean.astype(mean_sum.dtype), "running_var": var.astype(square_sum.dtype)}
