"""What a model computes on chosen inputs: the reference an ONNX file is held against.

The inputs are few and differ in all that a file may depend on: batch size, scale, and height and width where the
file leaves them free. What the user has shown, as an example or as data, is among them.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, spoken
from ..frameworks.contract import Framework
from ..frameworks.detect import get_framework
from ..frameworks.example import Inputs
from .drawn import NOISE, SHOWN, Drawn, Input, parts, repeated
from .rows import marks

Array = NDArray[Any]
Arrays = dict[str, Array]
Errors = dict[str, float]

BATCH_SIZES = (1, 2, 5, 3)
SCALES = (1.0, 0.1, 1.0, 100.0)
"""What standard normal inputs are multiplied by, batch by batch."""

SIZES = ((64, 64, 16), (77, 101, 9), (96, 160, 32), (224, 256, 48), (299, 331, 64))
"""Sizes for the dimensions a file leaves free; of these the first two that the model takes."""

SAMPLES = 16384
"""Values that are kept of a layer's output, evenly spread."""

SAME = 1e-5
"""Largest difference, relative to scale, of two runs that are taken for the same: threads may round otherwise."""

FEW = 64
"""Number of values below which the framework's own error in them is the largest of several draws.

The rounding of one number is one draw, and may be none by chance, where the next is the size of all that cancels in it.
"""

DRAWS, NEAR = 8, 1e-3
"""How many, and the deviation of what the inputs are multiplied by in each, about one.

In each the weights of the float64 copy are rounded another way too, as those that a file has folded are.
"""

COVERING = 32
"""Most samples that are run for no more than to reach every row of a table, such as an embedding's."""


@dataclass
class Batch:
    """One set of inputs and what the model returns for it; ``layers`` are samples of its layers' outputs.

    ``scale`` is what standard normal inputs were multiplied by, None for others, of which ``origin`` says where they
    are from. What is ``spare`` need not be right where the model itself is not determined in float32. ``exact`` are
    outputs and layers in float64, ``errors`` the largest of float32 in those of few values; None where they were not
    asked for yet.
    """

    scale: float | None
    arrays: Arrays
    outputs: Arrays
    layers: Arrays
    exact: tuple[Arrays, Arrays] | None = None
    errors: tuple[Errors, Errors] | None = None
    origin: str = "data"
    spare: bool = False

    @property
    def inputs(self) -> str:
        """What its inputs are: ``x0.1`` for noise, ``example``, ``data``, or ``drawn`` where they are like those."""
        return self.origin if self.scale is None else f"x{self.scale:g}"

    @property
    def size(self) -> int:
        """Number of samples."""
        return next((len(array) for array in self.arrays.values() if array.ndim), 1)

    @property
    def infinite(self) -> list[str]:
        """Names of the outputs that hold NaN or infinity."""
        return [name for name, output in self.outputs.items() if not np.isfinite(output).all()]

    @property
    def infinite_layers(self) -> list[str]:
        """Names of the layers, in call order, whose outputs hold NaN or infinity."""
        return [name for name, output in self.layers.items() if not np.isfinite(output).all()]


@dataclass
class Reference:
    """A model's own answers, batch by batch; ``problems`` say why a model cannot serve as a reference.

    ``coverage`` has for each table that indices choose from, such as an embedding, how many of its rows they reached,
    and how many it has; ``rows`` the `marks` of all of them.
    """

    batches: list[Batch]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    double: Callable[[Arrays], tuple[Arrays, Arrays]] | None = None
    coverage: dict[str, tuple[int, int]] = field(default_factory=dict)
    rows: Arrays = field(default_factory=dict)
    near: Callable[[Arrays, int], tuple[tuple[Arrays, Arrays], tuple[Arrays, Arrays]]] | None = None

    def errors(self, batch: Batch) -> tuple[Errors, Errors]:
        """Return the framework's largest error in each output and layer of few values, on inputs about a batch's."""
        if batch.errors is None:
            batch.errors = ({}, {})
            rng = np.random.default_rng(0)
            if self.near is None or not any(self.exact(batch)):
                return batch.errors
            for seed in range(DRAWS):
                arrays = {name: _near(array, rng) for name, array in batch.arrays.items()}
                try:
                    both = zip(batch.errors, *self.near(arrays, seed), strict=True)
                except Exception:  # of a model that takes no numbers but those
                    break
                for errors, narrow, wide in both:
                    for name in (name for name in narrow if narrow[name].size < FEW and name in wide):
                        apart = np.abs(narrow[name].astype(np.float64) - wide[name]).max(initial=0.0)
                        errors[name] = max(errors.get(name, 0.0), float(np.nan_to_num(apart)))
        return batch.errors

    def exact(self, batch: Batch) -> tuple[Arrays, Arrays]:
        """Return outputs and layers of a batch in float64, computed on first use; nothing where there is no copy."""
        if batch.exact is None:
            batch.exact = ({}, {})
            if self.double is not None:
                try:
                    batch.exact = self.double(batch.arrays)
                except Exception as error:
                    note = f"no float64 reference: {_first_line(error)}"
                    self.notes += [] if note in self.notes else [note]
        return batch.exact


def collect(
    model: Any,
    template: Inputs,
    inputs: Sequence[Input],
    *,
    examples: Sequence[Arrays] = (),
    data: Sequence[Arrays] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seed: int = 0,
) -> Reference:
    """Return what ``model`` computes on inputs of the kind a file declares.

    The model is run twice on the first batch: one that is random at inference is no reference for anything.
    ``template`` has an array for each of the inputs where the model takes it; ``examples`` and ``data`` are inputs of
    the user's own, by name, which are run as they are and which others are made of.
    """
    drawn = Drawn(inputs, [*examples, *data], np.random.default_rng(seed))
    collecting = _Collecting(model, template, drawn)
    reference = collecting.reference
    try:
        counts = list(batch_sizes)
        most = max(counts)
        for arrays in examples:
            whole = drawn.batch is not None and collecting.add(repeated(arrays, drawn, most), "example", trying=True)
            for part in [] if whole else parts(arrays, inputs):
                collecting.add(part, "example")
            if whole and drawn.tells and len(counts) > 1 and most in counts:
                counts.remove(most)  # which the example stands for
        for part in (part for arrays in data for part in parts(arrays, inputs)):
            collecting.add(part, "data")
        if not reference.problems:
            collecting.draw(counts, batch_sizes[0])
        way = "" if drawn.shown else f"; give {_given()}, if those drawn are not what it takes"
        if (batch := next((each for each in reference.batches if each.infinite), None)) is not None:
            first = next((f", from layer {layer} on" for layer in batch.infinite_layers), "")
            reference.problems = [f"the model's own {batch.infinite[0]} is not finite{first}{way}"]
            reference.notes = []  # of what was left out since it was not finite either
    except Exception as error:
        taken = ", ".join(map(str, inputs))
        way = "" if drawn.shown else f"; give {_given()}, if those drawn are not what it takes"
        reference.problems.append(f"the model does not accept the file's inputs ({taken}): {_first_line(error)}{way}")
    reference.batches.sort(key=lambda batch: batch.origin != "drawn")  # the small ones first
    reference.coverage, reference.rows = collecting.tables.coverage, collecting.tables.rows
    return reference


def drawn_example(model: Any, *, seed: int = 0) -> Inputs | None:
    """Return two samples of what ``model`` says of its inputs, or more if it takes those, None if it tells too little.

    Whole numbers are within the table that they choose from. Raises `InputError` where the model takes none of what is
    drawn.
    """
    framework = get_framework(model)
    shapes, types = framework.input_shapes(model), framework.input_types(model)
    if shapes is None or types is None or any(size is None for shape in shapes for size in shape):
        return None
    template = Inputs(*(np.zeros((0, *(size or 0 for size in shape))) for shape in shapes))
    names = framework.input_names(model, template)
    kinds = [np.dtype(np.float32 if "float" in kind else kind) for kind in types]
    inputs = [
        Input(name, kind, ("batch", *(size or 1 for size in shape)))
        for name, kind, shape in zip(names, kinds, shapes, strict=True)
    ]
    drawn = Drawn(inputs, [], np.random.default_rng(seed))
    collecting = _Collecting(model, template, drawn)
    if all(kind.kind == "f" for kind in kinds) and not collecting.tables.layers:
        return template.filled(list(drawn.draw(2, {}, 1.0, NOISE).values()))
    problem = ""
    for count, how in product([2, *(2 * step for step in drawn.steps)], drawn.ways):
        arrays = drawn.draw(count, {}, 1.0, how)
        try:
            collecting.run(arrays)
        except Exception as error:
            problem = problem or _first_line(error)
            continue
        chosen = drawn.draw(count, {}, 1.0, NOISE) if drawn.rows else arrays
        return template.filled(list((chosen if collecting.takes(chosen) else arrays).values()))
    taken = ", ".join(map(str, inputs))
    raise InputError(f"expected {_given()}, since the model takes no numbers drawn for {taken}: {problem}")


class _Tables:
    """The tables of a model that indices choose rows from: what a call looks up, and which rows all calls reached."""

    def __init__(self, framework: Framework, model: Any) -> None:
        self.framework = framework
        found = framework.tables(model)
        self.layers = {name: layer for name, (layer, _, _) in found.items()}
        self.rows = {name: marks(framework.to_numpy(rows)) for name, (_, _, rows) in found.items() if rows is not None}
        self.reached = {name: np.zeros(count, np.bool_) for name, (_, count, _) in found.items()}
        self.looked_up: list[tuple[Array, int]] = []

    def watching(self) -> Any:
        """Note what is looked up within the context, and nothing of what was before."""
        self.looked_up.clear()
        if not self.layers:
            return nullcontext()
        return self.framework.watching(self.layers, self._see)

    def _see(self, name: str, indices: Any, _: Any) -> None:
        found = np.asarray(self.framework.to_numpy(indices)).astype(np.int64)
        reached = self.reached[name]
        reached[found[(found >= 0) & (found < len(reached))]] = True
        self.looked_up.append((found, len(reached)))

    @property
    def coverage(self) -> dict[str, tuple[int, int]]:
        """How many rows of each table were reached, of how many."""
        return {name: (int(rows.sum()), len(rows)) for name, rows in self.reached.items()}


class _Collecting:
    """The runs of a model that become a reference."""

    def __init__(self, model: Any, template: Inputs, drawn: Drawn) -> None:
        self.framework = get_framework(model)
        self.model, self.template, self.drawn = model, template, drawn
        self.tables = _Tables(self.framework, model)
        self.how, self.taken = NOISE, False  # how inputs are drawn now, and whether the model took some
        self.step = 1  # what numbers of samples have to be multiples of
        self.instead: dict[int, int] = {}  # numbers of samples the model does not take, and those run for them
        twin = cache(lambda: self.framework.in_double(model))
        self.reference = Reference([], double=lambda arrays: self._record(_wide(arrays), twin()))
        self.reference.near = lambda arrays, seed: (
            self._record(arrays, self.model),
            self._rounded(arrays, twin(), seed),
        )

    def _record(self, arrays: Arrays, model: Any) -> tuple[Arrays, Arrays]:
        outputs, layers = self.framework.record(model, self.template.filled(list(arrays.values())))
        return outputs, {name: samples(layer) for name, layer in layers.items()}

    def _rounded(self, arrays: Arrays, twin: Any, seed: int) -> tuple[Arrays, Arrays]:
        """Return what the float64 copy computes with its weights rounded, in one of many ways."""
        back = self.framework.snapshot(twin)
        try:
            self.framework.round_weights(twin, seed)
            return self._record(_wide(arrays), twin)
        finally:
            back()

    def run(self, arrays: Arrays) -> tuple[Arrays, Arrays]:
        """Return what the model computes, and note which rows of tables it looks up."""
        with self.tables.watching():
            found = self._record(arrays, self.model)
        if self.tables.looked_up:
            self.drawn.choosing(arrays, self.tables.looked_up)
        return found

    def add(self, arrays: Arrays, origin: str, scale: float | None = None, *, trying: bool = False) -> bool:
        """Run the model on inputs and keep the answers; if ``trying`` only where they are, and are finite."""
        reference = self.reference
        try:
            with self.framework.inference(self.model):  # what is random goes on from one run to the next
                batch = Batch(scale, arrays, *self.run(arrays), origin=origin)
                problem = None if reference.batches else _random_problem(batch.outputs, self.run(arrays)[0])
        except Exception:
            if trying:
                return False
            raise
        if trying and batch.infinite:
            return False
        batch.spare = origin == "drawn" and (scale not in (None, 1.0) or bool(self.drawn.shown))
        reference.batches.append(batch)
        if problem is not None:
            reference.problems.append(problem)
        return True

    def draw(self, counts: Sequence[int], first: int) -> None:
        """Add inputs that are drawn, one batch for each of ``counts``, and what reaches the other rows of tables.

        Raises what the model raises if it takes none and nothing was shown.
        """
        sizes = self._sizes_taken(first)
        if self.drawn.free and len(sizes) == 1:
            self.reference.notes.append("one height and width only: of those tried the model takes no second")
        if self.tables.layers and not self.drawn.shown:  # to see which inputs choose rows
            any(self.takes(self.drawn.draw(first, sizes[0], 1.0, how)) for how in self.drawn.ways)
        for count, scale, size in zip(counts, cycle(SCALES), cycle(sizes), strict=False):
            self._draw_batch(count, size, scale)
        if self.instead:
            left, run = (", ".join(map(str, sizes)) for sizes in (self.instead.keys(), self.instead.values()))
            self.reference.notes.append(f"the model takes no inputs of batch {left}: of batch {run} in their place")
        self._cover(sizes[0])

    def _draw_batch(self, count: int, size: Mapping[str, int], scale: float) -> None:
        """Add one batch of noise, as long as the model takes that, or else of what is nearer to what was shown."""
        drawn, reference = self.drawn, self.reference
        steps = [] if drawn.batch is None else [self.step] if self.step > 1 else drawn.steps
        for step in dict.fromkeys([1, *steps]):
            for how in (each for each in drawn.ways if each >= self.how):
                noise = how == NOISE and drawn.noisy
                arrays = drawn.draw(count * step, size, scale, how)
                if self.add(arrays, "drawn", scale if noise else None, trying=True):
                    self.how, self.taken = how, True
                    if step > 1:
                        self.step, self.instead[count] = step, count * step
                    return
                if noise and self.taken and scale != 1 and self.takes(drawn.draw(count * step, size, 1.0, how)):
                    reference.notes.append(f"inputs x{scale:g} left out: the model itself is not finite there")
                    return
        if drawn.shown:
            reference.notes.append(f"inputs of batch {count} like those given left out: the model does not take them")
        else:  # to say why
            self.add(drawn.draw(count, size, 1.0, NOISE), "drawn", 1.0)

    def _cover(self, size: Mapping[str, int]) -> None:
        """Reach the rows of tables that were neither shown nor drawn, where a few samples do."""
        drawn = self.drawn
        for name in [] if self.how >= SHOWN or not self.taken else drawn.rows:
            one = drawn.draw(self.step, size, 1.0, SHOWN)[name]
            per_sample = one.size // max(1, len(one) if one.ndim else 1)
            samples_needed = math.ceil(drawn.left(name) / max(1, per_sample))
            at_once = math.ceil(samples_needed / self.step) * self.step if drawn.batch is not None else len(one)
            if 0 < samples_needed <= COVERING:
                for _ in range(math.ceil(samples_needed / at_once)):
                    self.add(drawn.draw(at_once, size, 1.0, self.how), "drawn", trying=True)

    def _sizes_taken(self, count: int) -> list[dict[str, int]]:
        """Return two sets of sizes for the free dimensions, or as many as the model takes; raises if it takes none.

        What was shown has sizes that it takes.
        """
        drawn = self.drawn
        if not drawn.free:
            return [{}]
        taken: list[dict[str, int]] = []
        tried = [dict(zip(drawn.free, cycle(each), strict=False)) for each in SIZES]
        for step in [1, *([] if drawn.batch is None else drawn.steps)]:
            for sizes in tried:
                if any(self.takes(drawn.draw(count * step, sizes, 1.0, how)) for how in drawn.ways):
                    taken.append(sizes)
                if len(taken) == 2:
                    break
            if taken:
                break
        if not taken and not drawn.shown:
            self.run(drawn.draw(count, dict(zip(drawn.free, cycle(SIZES[-1]), strict=False)), 1.0, NOISE))
        return taken or [{}]

    def takes(self, arrays: Arrays) -> bool:
        """Return whether the model computes something of inputs."""
        try:
            self.run(arrays)
        except Exception:
            return False
        return True


def _wide(arrays: Arrays) -> Arrays:
    return {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in arrays.items()}


def _near(array: Array, rng: np.random.Generator) -> Array:
    """Return inputs whose floats are multiplied by about one each, which moves no whole number, and no zero."""
    if array.dtype != np.float32:
        return array
    return np.asarray(array * (1 + np.float32(NEAR) * rng.standard_normal(array.shape, np.float32)))


def samples(array: Array) -> Array:
    """Return values of a layer's output evenly spread over it, all of them where they are few."""
    return np.array(array.ravel()[:: max(1, array.size // SAMPLES)])


def scale_of(array: Array) -> float:
    """Return the largest absolute value, which differences are relative to."""
    return max(float(np.abs(array).max(initial=0.0)), float(np.finfo(np.float32).tiny))


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


def _given() -> str:
    """Return what an example is called where one may be given."""
    return spoken("--example FILE.npz", "an `example`")


def _first_line(error: Exception) -> str:
    """Return what an error says first, and of Keras's own what it is about."""
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    about = lines[1:] if lines and lines[0].startswith("Exception encountered when calling ") else lines
    return (about or lines or [type(error).__name__])[0].strip()
