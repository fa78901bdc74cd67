"""Keras weights of other systems in HDF5, read into our names and shapes and written back.

The layouts are those of titu1994/keras-switchnorm, titu1994/BatchRenormalization and
shaoanlu/GroupNormalization-keras. NumPy and h5py only. Gates are ordered instance, layer, batch throughout.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from ..errors import InputError, OutputExistsError
from ..sources.keras.hdf5 import require_readable
from .arrays import Array, Parts, Shapes, expect_shapes, expect_values

Kind = Literal["sn", "brn", "gn", "other"]

_GATES = ("mean_weight", "var_weight")
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


class KerasWeights(dict[str, LayerWeights]):
    """The layers of a file in its order, and the configurations that a whole model's file has of them, by name."""

    configs: Mapping[str, Mapping[str, Any]] = MappingProxyType({})


def read_keras_h5(path: Path) -> KerasWeights:
    """Return the weights in an HDF5 file of Keras 1 or 2, at its root or in ``model_weights``, by layer in file order.

    Layers of keras-switchnorm are ``"sn"`` and those of BatchRenormalization ``"brn"`` (``running_std`` is a variance
    that includes epsilon), with or without gamma and beta; those of GroupNormalization-keras are ``"gn"``, known by
    gamma and beta of (1, 1, 1, C), (1, C, 1, 1) or (1, C); all else is ``"other"``.

    Raises `InputError` for a file that is damaged or of another layout, for links, data outside the file and dtypes
    that are not numbers, for Theano's turned kernels, for a layer of these kinds of which a weight is missing,
    unexpected, of another shape, not finite or a negative variance, and for a nested model that holds one.

    Source: titu1994/keras-switchnorm, titu1994/BatchRenormalization, shaoanlu/GroupNormalization-keras.
    """
    import h5py

    if not path.is_file():
        raise InputError(f"expected a file at {path}, received none there")
    require_readable(path, looks_at_sizes=True)
    try:
        with h5py.File(path, "r") as file:
            require_no_link(file)
            root = file.get("model_weights", file)
            _require_tensorflow_layout(root)
            found = KerasWeights({layer: _read_layer(_member(root, layer)) for layer in _names(root, "layer_names")})
            found.configs = _configs(file)
            return found
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
        expect_shapes(flat, {part: (prod(shape),) for part, shape in weights.shapes.items()})
    except InputError as error:
        raise InputError(f"expected the arrays layer {layer} was read with, received others: {error}") from None
    return {name: flat[part].reshape(weights.shapes[part]) for part, name in weights.names.items()}


def _require_tensorflow_layout(root: Any) -> None:
    backend = _text(root.attrs.get("backend", b"tensorflow"))
    if backend == "theano":
        raise InputError(
            "expected convolution kernels as TensorFlow has them, received backend='theano', which turns them round; "
            "save the weights in Keras 2 on TensorFlow"
        )


def _configs(file: Any) -> dict[str, Mapping[str, Any]]:
    """Return the configurations of the layers in a whole model's file by name, {} for a file of weights."""
    text = file.attrs.get("model_config")
    if text is None:
        return {}
    try:
        found = dict(_configured(json.loads(_text(text))))
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected a model's configuration in JSON, received other text: {error}") from None
    return found


def _configured(data: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(data, dict):
        config = data.get("config")
        if "class_name" in data and isinstance(config, dict) and isinstance(config.get("name"), str):
            yield config["name"], config
        yield from _configured(list(data.values()))
    elif isinstance(data, list):
        for member in data:
            yield from _configured(member)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _read_layer(group: Any) -> LayerWeights:
    found = {name: plain_array(_member(group, name)) for name in _names(group, "weight_names")}
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
        expect_shapes(arrays, {part: (3,) if part in _GATES else affine for part in arrays})
        expect_values(arrays)
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


def require_no_link(file: Any) -> None:
    """Raise `InputError` for an HDF5 file with a link, which can lead to another file."""
    import h5py

    links = file.id.links
    if link := links.visit(lambda name, info: None if info.type == h5py.h5l.TYPE_HARD else name, info=True):
        raise InputError(f"expected data at {link.decode()}, received a link; put there what it points to")


def plain_array(dataset: Any) -> Array:
    """Return the numbers in a dataset of HDF5; raises `InputError` for others, and for data outside of the file."""
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
    names = list(map(_text, found))
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
