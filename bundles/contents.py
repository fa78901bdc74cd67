"""What a bundle's files tell of its layers: JSON and shapes of tensors alone, for which no model is built."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from ..convert.recipe import Recipe
from ..errors import InputError
from ..formats.fields import read
from ..formats.place import Place
from ..sources.tensors import header_of
from ..sources.weights import SUFFIX
from .manifest import read_manifest

_LARGEST = 2**28
"""Bytes of JSON that are read of an archive."""
_KERAS_KINDS = {"BatchNormalization": None, "SwitchNormalization": "sn", "BatchRenormalization": "brn"}


@dataclass(frozen=True)
class Norm:
    """A norm of a bundle's model: ``kind`` is what it was patched to, None where it was left.

    ``source`` is what it was before, "" where nothing tells, and ``channels`` and ``spatial`` are None there.
    """

    name: str
    source: str = ""
    channels: int | None = None
    spatial: tuple[int, ...] | None = None
    kind: str | None = None


@dataclass(frozen=True)
class _Tensor:
    """What the header of a safetensors file tells of a tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class KerasLayer:
    """A layer that a Keras file's configuration tells of: the path of names to it, its own name, class and arguments.

    ``shape`` is that of its input, where it is told.
    """

    path: str
    name: str
    kind: str
    config: dict[str, Any]
    shape: tuple[int | None, ...] | None = None


def weights_of(directory: Path) -> tuple[Path, Recipe]:
    """Return the file with a bundle's weights, and its recipe; raises `InputError` as `read_manifest` does."""
    _, recipe = read_manifest(directory)
    return directory / f"model{SUFFIX[recipe.framework]}", recipe


def norms_in(directory: Path) -> list[Norm]:
    """Return what the recipe in a bundle made, in its order, then what the weights tell of other norms."""
    path, recipe = weights_of(directory)
    patched = [Norm(c.name, c.source, c.channels, c.spatial, c.target.kind) for c in recipe.choices]
    known = {norm.name for norm in patched}
    found = _in_torch(path) if recipe.framework == "torch" else _in_keras(path)
    return [*patched, *(norm for norm in found if norm.name not in known)]


def by_number(name: str) -> list[tuple[int, str]]:
    """Return what sorts ``layer2`` before ``layer10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def keras_layers(path: Path) -> Iterator[KerasLayer]:
    """Yield the layers that the configuration in a ``.keras`` file tells of; raises `InputError` if it is damaged."""
    try:
        with ZipFile(path) as archive:
            if archive.getinfo("config.json").file_size > _LARGEST:
                raise ValueError(f"more than {_LARGEST} bytes of config.json")
            yield from _layers(json.loads(archive.read("config.json")), None)
    except (BadZipFile, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"expected a Keras model in {path}, received a damaged file: {error}") from None


def _layers(value: Any, path: str | None) -> Iterator[KerasLayer]:
    """Yield the layers in a configuration below ``path``, which is None outside of the model itself."""
    if isinstance(value, list):
        for each in value:
            yield from _layers(each, path)
    if not isinstance(value, dict):
        return
    config = value.get("config")
    if isinstance(config, dict) and isinstance(value.get("class_name"), str) and isinstance(config.get("name"), str):
        name = config["name"]
        if path is None:
            path = ""
        else:
            path = f"{path}/{name}" if path else name
            shape = (value.get("build_config") or {}).get("input_shape")
            yield KerasLayer(path, name, value["class_name"], config, tuple(shape) if shape else None)
    for key, part in value.items():
        if key == "replaced" and isinstance(part, dict):  # what `patchers.keras.saving` has of a class of the user's
            for name, (_, layer) in part.items():
                above = "/".join(filter(None, [path, name.rpartition("/")[0]]))
                yield from _layers(layer, above)
        elif isinstance(part, dict | list):
            yield from _layers(part, path)


def _in_torch(path: Path) -> Iterator[Norm]:
    """Yield the norms that a state dict tells of: what keeps running statistics, and SN's and BRN's own parts."""
    parts: dict[str, dict[str, list[int]]] = defaultdict(dict)
    told = {key: value for key, value in header_of(path).items() if key != "__metadata__"}
    for key, tensor in read(dict[str, _Tensor], told, Place(str(path), remedy="get the file once more")).items():
        stem, _, part = key.rpartition(".")
        parts[stem][part] = tensor.shape
    for stem in sorted(parts, key=by_number):
        here = parts[stem]
        kind = "sn" if {"mean_weight", "var_weight"} <= here.keys() else "brn" if "r_max" in here else None
        if kind or {"running_mean", "running_var"} <= here.keys():
            sizes = next((here[name] for name in ("running_mean", "weight", "bias") if here.get(name)), [None])
            yield Norm(stem, channels=sizes[0], kind=kind)


def _in_keras(path: Path) -> Iterator[Norm]:
    for layer in keras_layers(path):
        if layer.kind in _KERAS_KINDS:
            axis = layer.config.get("axis", -1)
            known = layer.shape is not None and isinstance(axis, int) and -len(layer.shape) <= axis < len(layer.shape)
            channels = layer.shape[axis] if known and layer.shape else None
            source = layer.kind if _KERAS_KINDS[layer.kind] is None else ""
            yield Norm(layer.path, source, channels, kind=_KERAS_KINDS[layer.kind])
