"""Inputs a model's user could have: those that were shown, others made of them, and noise for models that take it.

What numbers mean cannot be seen in an array, so no more is assumed than what every model of its kind bears: samples may
come in any order and number, if all of one sample's arrays stay together; whole numbers are what they are (token ids,
lengths, masks), unless they are seen to choose rows of a table, of which any may be chosen; other floats are numbers,
in whose place noise may stand where the model computes finite values of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import InputError

Array = NDArray[Any]
Arrays = dict[str, Array]

NOISE, AROUND, SHOWN, WITHIN = range(4)
"""How far what is drawn is from what was shown: noise in place of floats, floats moved a little, or samples alone.

Last, whole numbers are those of samples, but less than the number of samples, which they may be numbers of: edges name
nodes. Where nothing was shown it is noise and zeros and ones, noise and ones above zero, or noise and zeros.
"""

MOVED = 0.05
"""Standard deviation of what floats are multiplied by, about one; it leaves zeros and signs as they are."""

MOST_STEP = 8
"""How many numbers are tried of which a model may take multiples alone: a pair has two samples."""

MOST_VALUES = 2**28
_KINDS = {
    "FLOAT": np.float32, "FLOAT16": np.float32, "BOOL": np.bool_, "INT8": np.int8, "INT16": np.int16,
    "INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8, "UINT16": np.uint16,
}  # fmt: skip


@dataclass(frozen=True)
class Input:
    """An input of a file: name, NumPy type, and shape with a name for each size that is free."""

    name: str
    dtype: Any
    shape: tuple[int | str, ...]

    @classmethod
    def of(cls, value: onnx.ValueInfoProto) -> "Input":
        """Return what a graph says of an input; raises `InputError` if it is no tensor of a type models take."""
        tensor = value.type.tensor_type
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
        if kind not in _KINDS:
            raise InputError(
                f"expected inputs of {', '.join(_KINDS)}, received {value.name!r} of {kind}; export "
                "the model behind what reads it"
            )
        shape = tuple(
            size.dim_value if size.HasField("dim_value") else size.dim_param or f"{value.name}.{axis}"
            for axis, size in enumerate(tensor.shape.dim)
        )
        return cls(value.name, np.dtype(_KINDS[kind]), shape)

    def as_taken(self, array: Array) -> Array:
        """Return an array in the input's own type.

        Raises `InputError` for numbers that it cannot hold, such as a half where the file takes whole ones.
        """
        if array.dtype.kind not in "biuf":
            raise InputError(f"expected numbers for {self}, received an array of {array.dtype}")
        with np.errstate(invalid="ignore"):
            taken = array.astype(self.dtype)
        if self.dtype.kind != "f" and not np.array_equal(taken, array):
            other = array[taken != array].flat[0]
            raise InputError(
                f"expected {self.dtype} for {self}, received {other} of {array.dtype}; give numbers of that type"
            )
        return np.array(taken, order="C")

    def takes(self, array: Array) -> bool:
        """Return whether an array, or parts of it, have the input's rank and its fixed sizes behind the first."""
        if array.ndim != len(self.shape):
            return False
        return all(b in (a, 0) or isinstance(b, str) for a, b in zip(array.shape[1:], self.shape[1:], strict=True))

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(map(str, self.shape))})"


@dataclass
class Drawn:
    """Draws inputs of the kind a file declares, made of what was ``shown``.

    ``rows`` are the numbers of rows of the tables that an input was seen to choose from, see `choosing`.
    """

    inputs: Sequence[Input]
    shown: Sequence[Arrays]
    rng: np.random.Generator
    rows: dict[str, int] = field(default_factory=dict)
    _unused: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batch = next((e.shape[0] for e in self.inputs if e.shape and isinstance(e.shape[0], str)), None)
        """The name of the number of samples, None in a file where it is fixed."""

    @property
    def ways(self) -> tuple[int, ...]:
        """The ways to draw, from the furthest from what was shown to the nearest."""
        return (NOISE, AROUND, SHOWN, WITHIN) if self.shown else (NOISE, AROUND, WITHIN)

    @property
    def steps(self) -> list[int]:
        """What the model may take multiples of alone: the example's number of samples, or what divides it."""
        sizes = [shown[e.name].shape[0] for shown in self.shown for e in self.inputs if e.shape[:1] == (self.batch,)]
        if not self.shown:
            return list(range(2, MOST_STEP + 1))
        return sorted({step for size in sizes for step in range(2, size + 1) if size % step == 0})[:MOST_STEP]

    @property
    def free(self) -> list[str]:
        """The names of the sizes that are free, but for numbers of samples."""
        return list(dict.fromkeys(size for entry in self.inputs for size in entry.shape[1:] if isinstance(size, str)))

    @property
    def tells(self) -> bool:
        """Whether what was shown is more than constants, such as zeros of the right shape."""
        return any(array.min() < array.max() for arrays in self.shown for array in arrays.values() if array.size)

    def choosing(self, arrays: Arrays, looked_up: Sequence[tuple[Array, int]]) -> None:
        """Note which ``arrays`` were indices into tables, by what was looked up: indices, and how many rows."""
        for name, array in arrays.items():
            found = [rows for indices, rows in looked_up if _same_numbers(indices, array)]
            if found:
                self.rows[name] = max(min(found), int(array.max(initial=0)) + 1)

    @property
    def noisy(self) -> bool:
        """Whether noise stands in place of anything."""
        floats = [entry for entry in self.inputs if np.issubdtype(entry.dtype, np.floating)]
        return any(not self.shown or not _counts(self.shown[0][entry.name]) for entry in floats)

    def left(self, name: str) -> int:
        """Return how many rows of an input's table were neither shown nor drawn yet."""
        return len(self._left(name))

    def _left(self, name: str) -> list[int]:
        if name not in self._unused:
            shown = [arrays[name].ravel().astype(np.int64) for arrays in self.shown]
            rows = np.setdiff1d(np.arange(self.rows[name]), np.concatenate([*shown, np.array([], np.int64)]))
            self._unused[name] = self.rng.permutation(rows).tolist()
        return self._unused[name]

    def draw(self, count: int, sizes: Mapping[str, int], scale: float, how: int) -> Arrays:
        """Return inputs of ``count`` samples, in free dimensions of ``sizes`` or of what was shown.

        Raises `InputError` if they were too many values.
        """
        source = self.shown[int(self.rng.integers(len(self.shown)))] if self.shown else {}
        picked: dict[int, Array] = {}
        return {e.name: self._one(e, source.get(e.name), picked, count, sizes, scale, how) for e in self.inputs}

    def _one(
        self,
        entry: Input,
        shown: Array | None,
        picked: dict[int, Array],
        count: int,
        sizes: Mapping[str, int],
        scale: float,
        how: int,
    ) -> Array:
        if shown is not None and shown.ndim != len(entry.shape):
            raise InputError(f"expected an example of {entry}, received one of shape {shown.shape}")
        shape = [
            size if isinstance(size, int) else count if axis == 0 and size == self.batch
            else sizes.get(size, shown.shape[axis] if shown is not None else count)
            for axis, size in enumerate(entry.shape)
        ]  # fmt: skip
        if math.prod(shape) > MOST_VALUES:
            raise InputError(
                f"expected inputs of at most {MOST_VALUES} values, received {entry}; export the model for smaller ones"
            )
        if shown is None or not shown.size:
            return self._unseen(entry, shape, scale, how)
        if entry.name in self.rows and how < SHOWN:
            return self._chosen(entry.name, shape).astype(entry.dtype)
        if how == WITHIN and count and _numbers_of_samples(shown):
            shown = shown % count
        floats = np.issubdtype(entry.dtype, np.floating)
        if how == NOISE and floats and not _counts(shown):
            return self._noise(shape, scale)
        if how == NOISE and shown.dtype in (np.uint8, np.int8) and shown.ndim > 2:
            return self.rng.integers(shown.min(), int(shown.max()) + 1, shape).astype(entry.dtype)
        like = shown
        for axis, size in enumerate(shape):
            if axis == 0 and entry.shape[0] == self.batch:
                if len(shown) not in picked:  # the same samples of every input
                    picked[len(shown)] = self._samples(len(shown), size)
                like = like[picked[len(shown)]]
            elif size != shown.shape[axis]:
                like = np.take(like, np.arange(size) % shown.shape[axis], axis)
        if how == AROUND and floats and not _whole(shown):
            like = like * (1 + np.float32(MOVED) * self.rng.standard_normal(like.shape, np.float32))
        return np.array(like, entry.dtype, order="C")

    def _samples(self, of: int, count: int) -> Array:
        """Return ``count`` numbers of samples in any order, each once before one comes again."""
        rounds = [self.rng.permutation(of) for _ in range(math.ceil(count / of))]
        return np.concatenate(rounds)[:count]

    def _unseen(self, entry: Input, shape: Sequence[int], scale: float, how: int) -> Array:
        if entry.name in self.rows and how == NOISE:
            return self._chosen(entry.name, shape).astype(entry.dtype)
        if np.issubdtype(entry.dtype, np.floating):
            return self._noise(shape, scale) if how != AROUND else np.abs(self._noise(shape, 1.0)) + np.float32(0.01)
        if how != NOISE:
            return np.full(shape, how == AROUND, entry.dtype)
        return self.rng.integers(0, 256 if entry.dtype == np.uint8 else 2, shape).astype(entry.dtype)

    def _noise(self, shape: Sequence[int], scale: float) -> Array:
        return np.asarray(self.rng.standard_normal(tuple(shape), np.float32) * np.float32(scale))

    def _chosen(self, name: str, shape: Sequence[int]) -> Array:
        """Return rows of an input's table, none a second time before all were drawn."""
        unused, needed = self._left(name), math.prod(shape)
        found = [unused.pop() for _ in range(min(needed, len(unused)))]
        found += self.rng.integers(0, self.rows[name], needed - len(found)).tolist()
        return self.rng.permutation(np.array(found, np.int64)).reshape(tuple(shape))


def parts(arrays: Arrays, inputs: Sequence[Input]) -> list[Arrays]:
    """Return arrays as a file takes them: all at once, or in as many parts as its fixed number of samples makes."""
    fixed = {e.name: e.shape[0] for e in inputs if e.shape and isinstance(e.shape[0], int)}
    counts = [math.ceil(len(arrays[name]) / size) for name, size in fixed.items() if arrays[name].ndim and size]

    def part(entry: Input, number: int) -> Array:
        array, size = arrays[entry.name], fixed.get(entry.name)
        if size and array.ndim and len(array) and len(array) != size:
            array = array[(number * size + np.arange(size)) % len(array)]
        return entry.as_taken(array)

    return [{entry.name: part(entry, number) for entry in inputs} for number in range(max([1, *counts]))]


def repeated(arrays: Arrays, drawn: Drawn, count: int) -> Arrays:
    """Return at least ``count`` samples: those there are, and again from the first."""
    found = {}
    for entry in drawn.inputs:
        array = arrays[entry.name]
        if entry.shape and entry.shape[0] == drawn.batch and 0 < len(array) < count:
            array = array[np.arange(count) % len(array)]
        found[entry.name] = np.array(array, order="C")
    return found


def _whole(array: Array) -> bool:
    """Whether all values are whole numbers, and not all one."""
    return array.size > 0 and bool((array == np.trunc(array)).all() and array.min() < array.max())


def _counts(array: Array) -> bool:
    """Whether floats are rather ids, lengths or a mask than numbers: whole, and no images, nor all one value."""
    return _whole(array) and (array.ndim < 3 or len(np.unique(array)) == 2)


def _numbers_of_samples(array: Array) -> bool:
    """Whether an array may hold numbers of samples."""
    return array.dtype.kind in "iu" and array.ndim > 0 and bool((array >= 0).all())


def _same_numbers(indices: Array, array: Array) -> bool:
    """Whether ``indices`` are an array's numbers, floats without what is behind the point."""
    if indices.size != array.size or not array.size or array.dtype == np.bool_ or not np.isfinite(array).all():
        return False
    return bool((indices.ravel() == array.ravel().astype(np.int64)).all())
