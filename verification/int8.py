"""The proof of an int8 file, in which rounding is told apart from faults.

Without its rounding the file has to compute what the model computes, as any file has to, with the weights of the float
file that it was made of. Each code has to be the one nearest to its weight, each step that of the range it was
chosen for. And it has to compute what the float weights and these steps give where they are rounded in float.
What is left between the file and the model is then rounding alone, which is measured on data.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..formats.fields import read
from .elsewhere import Runs
from .file import OnnxFile
from .quantized import Pair, Quantized, comparable, decibels
from .reference import FEW, Batch, Reference, samples
from .verdict import Check, Verdict, compare

Array = NDArray[Any]

STEP = 0.502
"""How many steps a code may be off: half a step, and float32's rounding of it."""

SAME = 1e-4
"""Largest relative difference of two scales that are taken for the same."""

SAME_CODES = 1e-5
"""Difference to the simulated model, relative to scale, that is none: correct files gave 0 without integer kernels."""

SHARE = 1.0
"""Largest difference to the simulated model, relative to that of the simulated one to the float one.

Integer kernels sum exactly what float32 rounds. A number that falls to the next code for that moves others behind it to
other codes, in a deep network so many that the differences come to what rounding itself is.
"""

SHARE_OF_FEW = 4.0
"""The same of an output of few numbers, in which either difference may be small by chance."""

LEAST = 8.0
"""Decibels that the noise has to be below an output on data, where that is more than a few numbers."""


class Rounded:
    """An int8 file beside the float weights that it was made of.

    ``problems`` are what is wrong in its codes, its steps and what they are steps of.

    Raises `InputError` for weights that are not those of its float file.
    """

    def __init__(self, file: OnnxFile, weights: Mapping[str, Array]) -> None:
        self._file, self._weights, self._quantized = file, weights, Quantized(file.proto, file.path.parent)
        self.problems = _problems(file, self._quantized, weights)

    @property
    def plain(self) -> OnnxFile:
        """The file without rounding."""
        return self._file.instead(self._quantized.without(self._weights))

    @property
    def simulated(self) -> OnnxFile:
        """The file with its rounding computed in float."""
        return self._file.instead(self._quantized.simulated(self._weights))


def _problems(file: OnnxFile, quantized: Quantized, weights: Mapping[str, Array]) -> list[str]:
    """Return where codes are not those of the float weights, or steps are not those of the ranges the file tells."""
    problems = [f"{name} is half of a pair of QuantizeLinear and DequantizeLinear" for name in quantized.odd]
    told = read(dict[str, Any], file.metadata.get("int8", {}), file.told("int8"))
    ranges = read(dict[str, tuple[float, float]], told.get("ranges", {}), file.told("int8", "ranges"))
    if others := sorted(set(ranges) ^ set(quantized.pairs)):
        problems.append(f"expected what is rounded to be what the file tells of, received another: {others[0]}")
    for value, pair in quantized.pairs.items():
        problems += _pair_problems(value, pair, ranges.get(value))
    for name, stored in quantized.stored.items():
        if not stored.by.fits(stored.codes.shape) or stored.codes.dtype != stored.by.zero.dtype:
            problems.append(f"{stored.name} has not one step above 0, or one for each channel, and whole numbers")
            continue
        array = quantized.float_of(name, weights).astype(np.float64)
        steps = stored.by.along(stored.by.scale, array.ndim).astype(np.float64)
        off = float((np.abs(stored.by.decoded(stored.codes) - array) / steps).max(initial=0.0))
        slack = float(np.abs(array / steps).max(initial=0.0)) * 2.0**-23  # of a float32 in these steps
        if off > STEP + slack:
            problems.append(f"{stored.name} is off by {off:.3g} of its steps, of which half a one is rounding")
    return problems or list(_bias_problems(quantized))


def _pair_problems(value: str, pair: Pair, bounds: tuple[float, float] | None) -> Iterator[str]:
    if not all(each.fits() for each in (pair.by, *pair.back)):
        yield f"{value} is not rounded to whole numbers by one step above 0"
        return
    for back in pair.back:
        if back.scale != pair.by.scale or back.zero != pair.by.zero or back.zero.dtype != pair.by.zero.dtype:
            yield f"{value} is decoded by another scale or zero point than it is encoded by"
    low, high = pair.by.limits
    step, zero = float(pair.by.scale.item()), int(pair.by.zero.item())
    if bounds is None or bounds[0] == bounds[1]:
        return
    wanted = (bounds[1] - bounds[0]) / (high - low)
    if not abs(step - wanted) <= SAME * wanted:  # nor any that is told as none
        yield f"{value} is rounded by steps of {step:.4g}, its range is one of {wanted:.4g}"
    elif abs((low - zero) - bounds[0] / wanted) > STEP:
        yield f"{value} has the zero point {zero}, its range one of {low - round(bounds[0] / wanted)}"


def _bias_problems(quantized: Quantized) -> Iterator[str]:
    """Yield the biases whose step is not that of the products they are added to, which integer kernels take it for."""
    pairs = {output: pair.by for pair in quantized.pairs.values() for output in pair.decoded}
    for node in quantized.proto.graph.node:
        bias = quantized.stored.get(node.input[2]) if len(node.input) > 2 else None
        if bias is None or bias.codes.dtype != np.int32:
            continue
        taken, weight = pairs.get(node.input[0]), quantized.stored.get(node.input[1])
        if taken is None or weight is None:
            yield f"{bias.name} has whole numbers beside an input or a weight that has none"
            continue
        wanted = weight.by.scale.astype(np.float64).ravel() * float(taken.scale.item())
        if wanted.size != bias.by.scale.size or np.any(np.abs(bias.by.scale.ravel() / wanted - 1) > SAME):
            yield f"{bias.name} has other steps than the products of {weight.name} that it is added to"


def judged(proven: Verdict, runs: Runs, simulated: Runs, float_runs: Runs, reference: Reference) -> Verdict:
    """Return the verdict of an int8 file of which it is ``proven`` what it is but for its rounding.

    ``runs`` are the file's, ``simulated`` those of the same rounding in float, ``float_runs`` those without it. What is
    chosen by comparing numbers has to be the same where both compute the same to the bit, without optimisation: where
    a number falls to the next code, another may be the largest.
    """
    if not proven:
        return proven
    checks: list[Check] = []
    problems: list[str] = []
    allowed: dict[str, float] = {}
    by_choice: set[str] = set()  # outputs of whole numbers, or as many as rounding decides: a class, the boxes left
    failed: Batch | None = None
    noisy: list[tuple[Mapping[str, Array], Mapping[str, Array]]] = []
    batches = [batch for batch in reference.batches if (batch.scale or 1.0) <= 1]  # others are beyond all ranges
    exactly = simulated.hows[0]
    expected = [simulated.outputs_of(exactly, batch) for batch in batches]
    plain = [float_runs.outputs_of(float_runs.hows[0], batch) for batch in batches]
    for name in runs.outputs:
        apart = [compare(rounded[name], exact[name])["max_rel"] for rounded, exact in zip(expected, plain, strict=True)]
        share = SHARE if expected[0][name].size >= FEW else SHARE_OF_FEW
        chosen = expected[0][name].dtype.kind != "f" or max(apart) == inf
        allowed[name] = SAME_CODES if chosen else max(SAME_CODES, share * max(apart))
        by_choice |= {name} if chosen else set()
    for how, (batch, rounded) in product(runs.hows, zip(batches, expected, strict=True)):
        try:
            found = runs.outputs_of(how, batch)
        except InputError:  # which is of time alone
            raise
        except Exception as error:
            problems.append(f"onnxruntime fails on inputs {batch.inputs} of batch {batch.size}: {error}")
            continue
        for name in runs.outputs:
            if name in by_choice and how != exactly:
                continue
            figures = compare(found[name], rounded[name])
            checks.append(Check(name, batch.size, batch.inputs, *how, tolerance=allowed[name], **figures))
            failed = failed if checks[-1].passed else failed or batch
        if batch.origin == "data" and how[1] == "on":
            noisy.append((found, batch.outputs))
    levels: dict[str, float] = {}
    for name in runs.outputs if noisy else ():
        pair = [found[name] for found, _ in noisy], [outputs[name] for _, outputs in noisy]
        if comparable(*pair):
            levels[name] = decibels(*pair)
    enough = [name for name in levels if sum(outputs[name].size for _, outputs in noisy) >= FEW]
    problems += [f"{name} has noise {levels[name]:.1f} dB below it on data, of which {LEAST:g} are expected"
                 for name in enough if levels[name] < LEAST]  # fmt: skip
    notes = [f"int8: on data the noise is {level:.1f} dB below {name}" for name, level in levels.items()
             if level < inf] or ["int8: no data to measure the noise of rounding on"]  # fmt: skip
    diverging = None if failed is None else _first(runs, simulated, failed)
    told = (*proven.notes, *notes)
    return Verdict(tuple(checks), tuple(problems), diverging, told, None, proven.coverage, proven.runtimes)


def _first(runs: Runs, simulated: Runs, batch: Batch) -> str | None:
    """Return the first layer, in call order, that differs from the simulated one's by more than a code in a few."""
    found, expected = runs.layers(batch), simulated.layers(batch)
    for name in (name for name in expected if name in found):
        if compare(samples(found[name]), samples(expected[name]))["max_rel"] > SAME_CODES:
            return name
    return None
