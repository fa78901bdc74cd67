"""Checkpoints of other systems' layers, read into our names and shapes and written back, in NumPy only.

PyTorch: switchablenorms/Switchable-Normalization. Keras, in HDF5: titu1994/keras-switchnorm,
titu1994/BatchRenormalization, shaoanlu/GroupNormalization-keras. Gates are ordered instance, layer, batch throughout.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..convert.carry_over import CLOSED_GATE
from ..errors import InputError, OutputExistsError

Array = NDArray[Any]
Parts = Mapping[str, Array]
Shapes = dict[str, tuple[int, ...]]
Kind = Literal["sn", "brn", "gn", "other"]

_SHOWN = 10
_GATES = ("mean_weight", "var_weight")
_RUNNING = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"
_PARTS = ("weight", "bias", *_GATES, *_RUNNING, _COUNTER)
_DIMENSIONS_OF_RANK = {2: 1, 4: 2, 5: 3}
_ROUNDING = 1e-5
"""How far below 0, relative to E[x²], rounding alone can push the variance taken from float32 sums."""

_REQUIRED: dict[Kind, tuple[str, ...]] = {
    "sn": ("mean_weights", "variance_weights", "moving_mean", "moving_variance"),
    "brn": ("running_mean", "running_std"),
}
_MARKS: dict[str, Kind] = {"mean_weights": "sn", "variance_weights": "sn", "running_std": "brn"}
_CANONICAL = {
    "mean_weights": "mean_weight",
    "variance_weights": "var_weight",
    "running_mean": "moving_mean",
    "running_std": "moving_variance",  # named std, holds a variance
}
_ATTRIBUTE_BYTES = 64512
"""Keras splits a longer list of names over several attributes: HDF5 holds no larger one."""

_PART = re.compile(rf"(?:^|[/_])({'|'.join(('gamma', 'beta', *_REQUIRED['sn'], *_REQUIRED['brn']))})(?::\d+)?$")


def is_switchablenorms(state: Parts) -> bool:
    """Return whether ``state`` holds a SwitchNorm as switchablenorms shapes it: with a gamma of rank 2 or more."""
    return any("weight" in parts and parts["weight"].ndim > 1 for parts in _layers(state).values())


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
    on (N, C) input that is the same function.

    Raises `InputError` as `from_switchablenorms` does, and for a layer without dimensions.

    Source: switchablenorms/Switchable-Normalization, names and shapes.
    """
    of = dimensions if isinstance(dimensions, Mapping) else dict.fromkeys(map(_layer, _layers(state)), dimensions)
    converted = _convert(state, lambda layer, parts: _to_published(parts, of.get(layer)), "in normswap's shapes")
    return {f"{prefix}{name}": array for name, array in converted.items()}


def _layers(state: Parts) -> dict[str, Parts]:
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
            result.pop(stem + _COUNTER, None)
            result |= {stem + part: array for part, array in converted.items()}
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise InputError(
            f"expected every SwitchNorm layer {expected}, received {len(problems)} of {len(layers)} that are not; "
            "use a whole checkpoint:\n  " + "\n  ".join(problems[:_SHOWN] + more)
        )
    return result


def _from_published(parts: Parts, batches: int | None) -> Parts:
    weight = parts.get("weight")
    if weight is None or weight.ndim not in _DIMENSIONS_OF_RANK:
        found = "missing" if weight is None else f"of shape {weight.shape}"
        raise InputError(f"weight is {found} instead of (1, C), (1, C, 1, 1) or (1, C, 1, 1, 1)")
    dimensions = _DIMENSIONS_OF_RANK[weight.ndim]
    shapes = _shapes(dimensions, weight.shape[1], dimensions == 1 or _has_batch_gate(parts))
    _expect_shapes(parts, shapes)
    own = {part: array.reshape(-1) for part, array in parts.items()}
    if batches is not None and "running_mean" in own:
        own |= _average(own["running_mean"], own["running_var"], batches)
    _expect_values(own)
    if dimensions == 1:
        own |= {gate: np.concatenate([own[gate][:1] + CLOSED_GATE, own[gate]]) for gate in _GATES}
    return own | ({_COUNTER: np.zeros((), np.int64)} if "running_mean" in own else {})


def _to_published(parts: Parts, dimensions: int | None) -> Parts:
    if dimensions is None or dimensions not in _DIMENSIONS_OF_RANK.values():
        raise InputError(f"`dimensions` is {dimensions} instead of 1, 2 or 3")
    own = {part: array for part, array in parts.items() if part != _COUNTER}
    channels, moving = own["weight"].size if "weight" in own else 0, dimensions == 1 or _has_batch_gate(own)
    _expect_shapes(own, _shapes(0, channels, moving))
    _expect_values(own)
    if dimensions == 1:
        own |= {gate: _join_instance_gate(own[gate]) for gate in _GATES}
    return {part: own[part].reshape(shape) for part, shape in _shapes(dimensions, channels, moving).items()}


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


def _expect_shapes(parts: Parts, shapes: Shapes) -> None:
    problems = [f"{part} is missing" for part in shapes if part not in parts]
    problems += [f"{part} is unexpected" for part in parts if part not in shapes]
    problems += [
        f"{part} is of shape {parts[part].shape} instead of {shape}"
        for part, shape in shapes.items()
        if part in parts and parts[part].shape != shape
    ]
    if problems:
        raise InputError(", ".join(problems))


def _expect_values(parts: Parts) -> None:
    for part, array in parts.items():
        if array.dtype.kind != "f":
            raise InputError(f"{part} is of dtype {array.dtype} instead of a floating-point one")
        if bad := int(np.count_nonzero(~np.isfinite(array))):
            raise InputError(f"{part} has {bad} values that are not finite")
        if part in ("running_var", "moving_variance") and (bad := int(np.count_nonzero(array < 0))):
            raise InputError(f"{part} has {bad} values below 0")


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One Keras layer's weights: arrays by canonical name, and the names and shapes they have in the file.

    Canonical names are gamma, beta, moving_mean, moving_variance, of (C,), and mean_weight, var_weight, of (3,);
    weights of kind ``"other"`` keep the file's names and shapes.
    """

    kind: Kind
    arrays: Parts
    names: Mapping[str, str]
    shapes: Shapes


def read_keras_h5(path: Path) -> dict[str, LayerWeights]:
    """Return the weights in an HDF5 file of Keras 1 or 2, at its root or in ``model_weights``, by layer in file order.

    Layers of keras-switchnorm are ``"sn"`` and those of BatchRenormalization ``"brn"`` (``running_std`` is a variance
    that includes epsilon), with or without gamma and beta; those of GroupNormalization-keras are ``"gn"``, known by
    gamma and beta of (1, 1, 1, C), (1, C, 1, 1) or (1, C); all else is ``"other"``.

    Raises `InputError` for a file that is damaged or of another layout, for links, data outside the file and dtypes
    that are not numbers, for a layer of these kinds of which a weight is missing, unexpected, of another shape, not
    finite or a negative variance, and for a nested model that holds one.

    Source: titu1994/keras-switchnorm, titu1994/BatchRenormalization, shaoanlu/GroupNormalization-keras.
    """
    import h5py

    if not path.is_file():
        raise InputError(f"expected a file at {path}, received none there")
    try:
        with h5py.File(path, "r") as file:
            links = file.id.links
            if link := links.visit(lambda name, info: None if info.type == h5py.h5l.TYPE_HARD else name, info=True):
                raise InputError(f"expected data at {link.decode()}, received a link; put there what it points to")
            root = file.get("model_weights", file)
            return {layer: _read_layer(_member(root, layer)) for layer in _names(root, "layer_names")}
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"{path}: expected a whole HDF5 file with weights, received another: {error}") from None


def write_keras_h5(
    path: Path, layers: Mapping[str, LayerWeights], *, group: str = "/", keras_version: str = "2.1.6"
) -> None:
    """Write ``layers`` to a new file, with the names and shapes they were read with, at its root or in ``group``.

    From ``keras_version`` Keras tells how kernels are laid out: give "1" for weights that Keras 1 wrote.

    Raises `OutputExistsError` if ``path`` exists, and `InputError` for arrays that no longer fit; nothing is written.
    """
    import h5py

    named = {layer: _in_file(layer, weights) for layer, weights in layers.items()}
    if path.exists():
        raise OutputExistsError(f"expected an output path that does not exist, received {path}")
    with h5py.File(path, "x") as file:
        root = file.require_group(group)
        root.attrs.update(backend=b"tensorflow", keras_version=keras_version.encode())
        _write_names(root, "layer_names", named)
        for layer, arrays in named.items():
            member = root.require_group(layer)
            _write_names(member, "weight_names", arrays)
            for name, array in arrays.items():
                member.create_dataset(name, data=array)


def _in_file(layer: str, weights: LayerWeights) -> Parts:
    flat = {part: array.reshape(-1) for part, array in weights.arrays.items()}
    try:
        _expect_shapes(flat, {part: (prod(shape),) for part, shape in weights.shapes.items()})
    except InputError as error:
        raise InputError(f"expected the arrays layer {layer} was read with, received others: {error}") from None
    return {name: flat[part].reshape(weights.shapes[part]) for part, name in weights.names.items()}


def _read_layer(group: Any) -> LayerWeights:
    found = {name: _array(_member(group, name)) for name in _names(group, "weight_names")}
    try:
        return _recognise(found)
    except InputError as error:
        raise InputError(f"expected a whole layer in {group.name}, received another: {error}") from None


def _recognise(found: Parts) -> LayerWeights:
    kind = _kind(found)
    names = {name if kind == "other" else _CANONICAL.get(_part(name), _part(name)): name for name in found}
    arrays = {part: found[name] for part, name in names.items()}
    shapes = {part: array.shape for part, array in arrays.items()}
    if kind != "other":
        affine = shapes["gamma"] if kind == "gn" else (arrays["moving_mean"].size,)
        _expect_shapes(arrays, {part: (3,) if part in _GATES else affine for part in arrays})
        _expect_values(arrays)
        arrays = {part: array.reshape(-1) for part, array in arrays.items()}
    return LayerWeights(kind, arrays, names, shapes)


def _kind(found: Parts) -> Kind:
    parts = [_part(name) for name in found]
    kind = next((_MARKS[part] for part in parts if part in _MARKS), None)
    if kind is None:
        grouped = any(a.ndim in (2, 4) and a.size in (a.shape[1], a.shape[-1]) for a in found.values())
        return "gn" if grouped and sorted(parts) == ["beta", "gamma"] else "other"
    if sorted({"gamma", "beta", *parts}) != sorted({"gamma", "beta", *_REQUIRED[kind]}) or len({*parts}) < len(parts):
        raise InputError(
            f"its weights are {', '.join(parts)} instead of {', '.join(_REQUIRED[kind])} with or without gamma and "
            "beta; save a nested model's weights by themselves"
        )
    return kind


def _part(name: str) -> str:
    return match[1] if (match := _PART.search(name)) else name


def _member(group: Any, name: str) -> Any:
    if name not in group:
        raise InputError(f"expected {name} in {group.name}, received a file without it")
    return group[name]


def _array(dataset: Any) -> Array:
    import h5py

    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "biuf":
        raise InputError(f"expected numbers in {dataset.name}, received {dataset}")
    # A small file must neither fill the memory nor read another file.
    if dataset.external or dataset.is_virtual or dataset.id.get_storage_size() < dataset.nbytes:
        raise InputError(
            f"expected plain data in {dataset.name}, received compressed, unwritten or external data; "
            "rewrite the file with `h5repack -f NONE`"
        )
    return np.asarray(dataset[()])


def _names(group: Any, attribute: str) -> list[str]:
    """Return the names in an attribute, or in the numbered ones that Keras splits a long list into."""
    numbered = takewhile(group.attrs.__contains__, (f"{attribute}{index}" for index in count()))
    keys = [attribute] if attribute in group.attrs else list(numbered)
    if not keys:
        raise InputError(f"expected an attribute {attribute} of {group.name}, as Keras 1 and 2 write, received none")
    found = [name for key in keys for name in np.ravel(group.attrs[key])]
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in found]
    if len({*names}) < len(names):
        raise InputError(f"expected different names in {attribute} of {group.name}, received one twice")
    return names


def _write_names(group: Any, attribute: str, names: Iterable[str]) -> None:
    encoded = np.array([name.encode() for name in names], dtype="S")
    rows = _ATTRIBUTE_BYTES // encoded.itemsize
    if encoded.size <= rows:
        group.attrs[attribute] = encoded
        return
    for index, start in enumerate(range(0, encoded.size, rows)):
        group.attrs[f"{attribute}{index}"] = encoded[start : start + rows]
