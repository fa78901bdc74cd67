"""What a model computes on chosen inputs: the reference an ONNX file is held against.

The inputs are few and differ in all that a file may depend on: batch size, scale, and height and width where the
file leaves them free.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import InputError
from ..frameworks.detect import get_framework
from ..frameworks.example import Inputs

Array = NDArray[Any]
Arrays = dict[str, Array]

BATCH_SIZES = (1, 2, 5, 3)
SCALES = (1.0, 0.1, 1.0, 100.0)
"""What standard normal inputs are multiplied by, batch by batch."""

SIZES = ((64, 64, 16), (77, 101, 9), (96, 160, 32), (224, 256, 48), (299, 331, 64))
"""Sizes for the dimensions a file leaves free; of these the first two that the model takes."""

SAMPLES = 16384
"""Values that are kept of a layer's output, evenly spread."""

SAME = 1e-5
"""Largest difference, relative to scale, of two runs that are taken for the same: threads may round otherwise."""

MOST_VALUES = 2**28
_KINDS = {"FLOAT": np.float32, "FLOAT16": np.float32, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_}


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
            raise InputError(f"expected inputs of {', '.join(_KINDS)}, received {value.name!r} of {kind}")
        shape = tuple(
            size.dim_value if size.HasField("dim_value") else size.dim_param or f"{value.name}.{axis}"
            for axis, size in enumerate(tensor.shape.dim)
        )
        return cls(value.name, np.dtype(_KINDS[kind]), shape)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(map(str, self.shape))})"


@dataclass
class Batch:
    """One set of inputs and what the model returns for it; ``layers`` are samples of its layers' outputs.

    ``scale`` is what standard normal inputs were multiplied by, None for data. ``exact`` are outputs and layers in
    float64, None where they were not asked for yet.
    """

    scale: float | None
    arrays: Arrays
    outputs: Arrays
    layers: Arrays
    exact: tuple[Arrays, Arrays] | None = None

    @property
    def size(self) -> int:
        """Number of samples."""
        return next((len(array) for array in self.arrays.values() if array.ndim), 1)

    @property
    def infinite(self) -> list[str]:
        """Names of the outputs that hold NaN or infinity."""
        return [name for name, output in self.outputs.items() if not np.isfinite(output).all()]


@dataclass
class Reference:
    """A model's own answers, batch by batch; ``problems`` say why a model cannot serve as a reference."""

    batches: list[Batch]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    double: Callable[[Arrays], tuple[Arrays, Arrays]] | None = None

    def exact(self, batch: Batch) -> tuple[Arrays, Arrays]:
        """Return outputs and layers of a batch in float64, computed on first use; nothing where there is no copy."""
        if batch.exact is None:
            batch.exact = ({}, {})
            if self.double is not None:
                try:
                    batch.exact = self.double(batch.arrays)
                except Exception as error:
                    self.notes.append(f"no float64 reference: {_first_line(error)}")
        return batch.exact


def collect(
    model: Any,
    template: Inputs,
    inputs: Sequence[Input],
    *,
    data: Sequence[Arrays] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seed: int = 0,
) -> Reference:
    """Return what ``model`` computes on inputs of the kind a file declares.

    The model is run twice on the first batch: one that is random at inference is no reference for anything.
    ``template`` has an array for each of the inputs where the model takes it; ``data`` are further inputs by name.
    """
    framework = get_framework(model)
    twin = cache(lambda: framework.in_double(model))

    def run(arrays: Arrays, of: Any = model) -> tuple[Arrays, Arrays]:
        outputs, layers = framework.record(of, template.filled(list(arrays.values())))
        return outputs, {name: samples(layer) for name, layer in layers.items()}

    def double(arrays: Arrays) -> tuple[Arrays, Arrays]:
        return run({n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in arrays.items()}, twin())

    rng = np.random.default_rng(seed)
    reference = Reference([], double=double)
    try:
        sizes = _sizes_taken(run, rng, inputs, batch_sizes[0])
        if _free(inputs) and len(sizes) == 1:
            reference.notes.append("one height and width only: of those tried the model takes no second")
        for count, scale, size in zip(batch_sizes, cycle(SCALES), cycle(sizes), strict=False):
            arrays = _draw(rng, inputs, count, size, scale)
            with framework.inference(model):  # what is random goes on from one run to the next
                batch = Batch(scale, arrays, *run(arrays))
                problem = None if reference.batches else _random_problem(batch.outputs, run(arrays)[0])
            if problem is not None:
                reference.problems.append(problem)
                return reference
            if scale == 1 or not batch.infinite:
                reference.batches.append(batch)
            else:
                reference.notes.append(f"inputs x{scale:g} left out: the model itself is not finite there")
        for given in data:
            arrays = {
                entry.name: np.ascontiguousarray(given[entry.name][: entry.shape[0]])
                if entry.shape and isinstance(entry.shape[0], int)
                else np.ascontiguousarray(given[entry.name])
                for entry in inputs
            }
            reference.batches.append(Batch(None, arrays, *run(arrays)))
        for name in (name for batch in reference.batches for name in batch.infinite):
            reference.problems = [f"the model's own {name} is not finite"]
    except Exception as error:
        taken = ", ".join(map(str, inputs))
        reference.problems.append(f"the model does not accept the file's inputs ({taken}): {_first_line(error)}")
    return reference


def samples(array: Array) -> Array:
    """Return values of a layer's output evenly spread over it, all of them where they are few."""
    return np.array(array.ravel()[:: max(1, array.size // SAMPLES)])


def scale_of(array: Array) -> float:
    """Return the largest absolute value, which differences are relative to."""
    return max(float(np.abs(array).max(initial=0.0)), float(np.finfo(np.float32).tiny))


def _free(inputs: Sequence[Input]) -> list[str]:
    """Return the names of the sizes that are free, but for the batch's."""
    return list(dict.fromkeys(size for entry in inputs for size in entry.shape[1:] if isinstance(size, str)))


def _sizes_taken(
    run: Callable[[Arrays], Any], rng: np.random.Generator, inputs: Sequence[Input], count: int
) -> list[tuple[int, ...]]:
    """Return two sets of sizes for the free dimensions, or as many as the model takes; raises if it takes none."""
    if not _free(inputs):
        return [()]
    taken: list[tuple[int, ...]] = []
    refusal: Exception | None = None
    for sizes in SIZES:
        try:
            run(_draw(rng, inputs, count, sizes, 1.0))
        except Exception as error:
            refusal = error
        else:
            taken.append(sizes)
        if len(taken) == 2:
            break
    if refusal is not None and not taken:
        raise refusal
    return taken


def _draw(rng: np.random.Generator, inputs: Sequence[Input], count: int, sizes: Sequence[int], scale: float) -> Arrays:
    chosen = dict(zip(_free(inputs), cycle(sizes), strict=False)) if sizes else {}
    arrays = {}
    for entry in inputs:
        named = [count if axis == 0 and isinstance(size, str) else size for axis, size in enumerate(entry.shape)]
        shape = [chosen[size] if isinstance(size, str) else size for size in named]
        if math.prod(shape) > MOST_VALUES:
            raise InputError(f"expected inputs of at most {MOST_VALUES} values, received {entry}")
        if entry.dtype == np.float32:
            arrays[entry.name] = rng.standard_normal(shape, np.float32) * np.float32(scale)
        else:
            arrays[entry.name] = rng.integers(0, 2, shape).astype(entry.dtype)
    return arrays


def _random_problem(first: Mapping[str, Array], second: Mapping[str, Array]) -> str | None:
    for name, array in first.items():
        once, again = array.astype(np.float64), second[name].astype(np.float64)
        apart = float(np.abs(np.nan_to_num(once) - np.nan_to_num(again)).max(initial=0.0)) / scale_of(once)
        if apart > SAME:
            return (
                f"the model computes something else each time: {name} differs by {apart:.2g} of its scale between "
                "two runs on one input; take out what is random at inference, such as dropout left on"
            )
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
