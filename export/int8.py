"""A proved float file in int8: weights per channel, activations per tensor, norms that are kept in float.

Convolutions and products with stored weights are quantized by onnxruntime's own QDQ quantizer, with the sums and
poolings between them. What takes statistics of a sample stays float, with what it reads: γ and the gates multiply each
channel by its own number, and eight bits for all channels together leave the small ones none.
"""

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import ceil, inf, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from ..errors import InputError, UnsupportedError
from ..frameworks import several
from ..frameworks.detect import get_framework
from ..frameworks.example import Inputs
from ..verification.drawn import Input, parts
from ..verification.file import OnnxFile, read_model
from ..verification.quantized import SUFFIX, Quantized, comparable, decibels, weights_of
from ..verification.runtime import session
from ..verification.verdict import Verdict
from ..verification.verify import given_arrays, verify

Array = NDArray[Any]
Arrays = dict[str, Array]

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""What is quantized where its weights are stored."""
BETWEEN = ("Add", "GlobalAveragePool")
"""What is computed on codes too where it stands between linear layers whose norms folded."""

FEWEST = 16
"""The least number of calibration inputs, of which none counts twice."""

BATCH, ASIDE = 4, 4
"""How many of them are run at once, and which batches are kept aside: they judge what the others choose."""

MOST_BYTES = 2**31 - 2**24
"""What protobuf holds, which the quantizer works on."""

SHARES = (1.0, 0.99999, 0.9999, 0.999)
"""How much of a value's distribution its range may hold; each value gets what errs least on the samples kept of it."""

KEPT = 2**19
"""How many numbers of a value are kept to choose its range by, of all batches together."""

ENOUGH = 20.0
"""Decibels that the output's noise has to be below it: a tenth of its deviation; else see `HARM`."""

HARM = 26.0
"""What alone makes noise less far below the output, a quarter of all that is allowed, is then left in float."""

MOST_LEFT = 0.25
"""Largest share of what is quantized, values and weights, that is left in float."""

TRIALS, SHOWN = 4, 8
"""How many batches of those kept aside tell what noise each makes alone, and how many the file is proved on."""


@dataclass
class Int8:
    """How a file was quantized.

    ``layers`` convolutions and dense layers were, ``nodes`` there are in all. ``ranges`` are those of the values that
    are rounded. ``left`` is what stays in float for its noise, with how far the output is above that in dB;
    ``noise_db`` tells the same of all noise, on inputs that no range was chosen by.
    """

    layers: int
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)
    noise_db: float = inf
    nodes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        noise_db = round(self.noise_db, 1) if isfinite(self.noise_db) else None
        return {"layers": self.layers, "left": self.left, "noise_db": noise_db}

    @property
    def notes(self) -> list[str]:
        """What people are told of it."""
        noise = f"noise {self.noise_db:.1f} dB below" if isfinite(self.noise_db) else "no noise measured in"
        told = f"int8: {self.layers} layers, {noise} the output on inputs kept aside"
        left = ", ".join(f"{name} ({alone:.1f} dB)" for name, alone in self.left.items())
        return [told, *([f"int8: left in float, since each by itself makes that noise: {left}"] if left else [])]


def in_int8(
    model: Any,
    path: Path,
    example: Inputs,
    given: Any,
    norms: Collection[str],
    *,
    data: Any,
    check: bool,
) -> tuple[Int8, Verdict | None]:
    """Write an int8 file in the place of the float file at ``path``, and hold it against that and the model.

    ``given`` are batches of inputs to calibrate on; those kept aside are what its noise is measured on, with ``data``.
    """
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    if size > MOST_BYTES:
        raise UnsupportedError(f"expected a model of {MOST_BYTES} bytes or less for int8, received one of {size}")
    batches = _batches(model, read_model(path), example, given)
    with TemporaryDirectory() as folder:
        float_file = Path(folder) / "float.onnx"
        shutil.copyfile(path, float_file)
        proto, report = quantize(float_file, batches, norms)
        path.write_bytes(proto.SerializeToString(deterministic=True))
        if not check:
            return report, None
        names = [value.name for value in proto.graph.input]
        aside = [example.filled([batch[name] for name in names]) for batch in batches[::ASIDE][:SHOWN]]
        shown = [*aside, *([] if data is None else data)]
        return report, verify(model, path, example=example, data=shown, float_file=float_file)


def _batches(model: Any, file: OnnxFile, example: Inputs, given: Any) -> list[Arrays]:
    """Return inputs to calibrate on, by the names of the file's and in small batches.

    Raises `InputError` for fewer than `FEWEST` that differ, and for such as the file does not take.
    """
    inputs = [Input.of(value) for value in file.inputs]
    framework = get_framework(model)
    runner = session(file.content, spinning=False)
    found: list[Arrays] = []
    seen: set[bytes] = set()
    total = 0
    for batch in several.batches(given):
        arrays = given_arrays(inputs, framework.ordered(model, Inputs.of(batch)), example)
        for name in (name for name, array in arrays.items() if array.dtype.kind == "f" and np.isnan(array).any()):
            raise _not_finite(name)
        rows = _rows(arrays)
        total += len(rows)
        seen.update(rows)
        found += _small(runner, arrays, inputs)
    if len(seen) < FEWEST:
        repeated = "" if len(seen) == total else f", of which {total - len(seen)} repeat others"
        raise InputError(f"expected {FEWEST} inputs or more to calibrate int8 on, received {total}{repeated}")
    return found


def _rows(arrays: Arrays) -> list[bytes]:
    """Return what tells each sample of a batch from others: what all arrays that have as many rows hold of it."""
    lengths = [len(array) for array in arrays.values() if array.ndim]
    together = [array for array in arrays.values() if array.ndim and len(array) == max(lengths)]
    return [b"".join(array[row].tobytes() for array in together) for row in range(max(lengths, default=0))]


def _small(runner: onnxruntime.InferenceSession, arrays: Arrays, inputs: Sequence[Input]) -> list[Arrays]:
    """Return a batch in small ones, or as it is where the file takes no part of it, as of frames that make one clip.

    Raises `InputError` if the file takes neither.
    """
    free = {entry.shape[0] for entry in inputs if entry.shape}
    counts = {len(arrays[entry.name]) for entry in inputs if entry.shape}
    whole = parts(arrays, inputs)
    ways = [whole]
    if len(free) == len(counts) == 1 and isinstance(free.pop(), str):
        starts = range(0, counts.pop(), BATCH)
        ways = [[{name: array[start : start + BATCH] for name, array in arrays.items()} for start in starts], whole]
    quiet = onnxruntime.RunOptions()
    quiet.log_severity_level = 4
    refused = ""
    for way in ways:
        try:
            for part in way:
                runner.run(None, part, quiet)
        except Exception as error:
            refused = str(error)
        else:
            return way
    shapes = ", ".join(f"{entry} with {arrays[entry.name].shape}" for entry in inputs)
    raise InputError(f"expected inputs that the file takes to calibrate int8 on, received {shapes}: {refused}")


def quantize(path: Path, batches: Sequence[Arrays], norms: Collection[str]) -> tuple[onnx.ModelProto, Int8]:
    """Return the int8 model of a float file, and how it came about.

    ``norms`` are the names of those that take statistics from a sample: their nodes, named ``LAYER/PART``, stay float.
    Ranges are chosen on ``batches`` of the file's inputs; every fourth batch is kept aside, and tells the noise.

    Raises `UnsupportedError` if the file has nothing to quantize, `InputError` for inputs that are not finite.
    """
    weights = weights_of(path)
    proto = onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=False)
    aside = batches[::ASIDE]
    rest = [batch for number, batch in enumerate(batches) if number % ASIDE] or aside
    chosen = _chosen(proto, norms)
    rounded = [node for node in proto.graph.node if node.name in chosen]
    ranges = _ranges(proto, {name for node in rounded for name in (*node.input, *node.output)}, rest)
    quantizer = QDQQuantizer(
        onnx.ModelProto.FromString(proto.SerializeToString()),
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, {k: tuple(map(np.float32, v)) for k, v in ranges.items()}),
        nodes_to_quantize=list(chosen),
        nodes_to_exclude=[],
        op_types_to_quantize=[*LINEAR, *BETWEEN],
        extra_options={"MatMulConstBOnly": True, "QDQKeepRemovableActivations": True},
    )
    quantizer.quantize_model()
    made = _sorted(quantizer.model.model)
    _name_codes(made, proto)
    found = Quantized(made)
    report = Int8(sum(kind in LINEAR for kind in chosen.values()))
    exact = _run(proto, aside)
    needless = _needless(found, norms)
    left = _harmful(found, weights, needless, aside, exact, report)
    final = found.without(weights, _with_biases(found, needless | left))
    kept = Quantized(final)
    read = {name for node in final.graph.node for name in node.input}
    final = kept.without(weights, {value for value, pair in kept.pairs.items() if read.isdisjoint(pair.decoded)})
    report.ranges, report.nodes = {name: ranges[name] for name in Quantized(final).pairs}, len(final.graph.node)
    _tell(final, proto, report)
    return final, report


def _tell(made: onnx.ModelProto, of: onnx.ModelProto, report: Int8) -> None:
    """Let the int8 file say what the float one says, and its ranges."""
    made.producer_name, made.producer_version, made.ir_version = of.producer_name, of.producer_version, of.ir_version
    told = {entry.key: entry.value for entry in of.metadata_props if entry.key != "normswap.verdict"}
    told["normswap.int8"] = json.dumps({**report.to_dict(), "ranges": report.ranges}, separators=(",", ":"))
    del made.metadata_props[:]
    made.metadata_props.extend(onnx.StringStringEntryProto(key=key, value=told[key]) for key in sorted(told))


def _chosen(proto: onnx.ModelProto, norms: Collection[str]) -> dict[str, str]:
    """Return the nodes to quantize with their types: linear ones with stored weights, and what is between them."""
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in proto.graph.node):
        raise UnsupportedError("expected a model in float for int8, received one that rounds values to codes itself")
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    on_codes: set[str] = set()
    found: dict[str, str] = {}
    for node in proto.graph.node:
        taken = [name for name in node.input if name and name not in stored]
        within = node.name.rpartition("/")[0] in norms
        linear = node.op_type in LINEAR and not within and taken == [node.input[0]] and _per_channel(node, stored)
        between = node.op_type in BETWEEN and not within and bool(taken) and on_codes.issuperset(node.input)
        if linear or between:
            found[node.name] = node.op_type
        if linear or between or (node.op_type in PASSING and taken and taken[0] in on_codes):
            on_codes.update(node.output)
    if not any(kind in LINEAR for kind in found.values()):
        raise UnsupportedError("expected a model with convolutions or dense layers for int8, received one without")
    return found


def _per_channel(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether one step for each output channel is one of its weight, and of its bias that of the products it adds to.

    It is not in a transposed convolution in groups, nor in a Gemm that multiplies its terms or adds a matrix.
    """
    told = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "ConvTranspose":
        return "group" not in told or told["group"].i == 1
    plain = all(told[name].f == 1 for name in ("alpha", "beta") if name in told)
    return plain and all(len(stored[name].dims) == 1 for name in node.input[2:] if name)


PASSING = ("Relu", "Clip", "Pad", "Slice", "MaxPool", "Transpose", "Reshape", "Flatten", "Identity", "Squeeze")
"""What hands on values as they are, or cuts them off."""


def _ranges(
    proto: onnx.ModelProto, wanted: Collection[str], batches: Sequence[Arrays]
) -> dict[str, tuple[float, float]]:
    """Return a range for every float value of those wanted: as much of its distribution as errs least."""
    names = [name for node in proto.graph.node for name in node.output if name in wanted]
    given = [value.name for value in proto.graph.input if value.name in wanted]
    kept: dict[str, list[Array]] = {}
    bounds: dict[str, tuple[float, float]] = {}
    more = OnnxFile(Path(), proto.SerializeToString(), proto).with_outputs(names)
    runner = session(more, spinning=False)
    for batch in batches:
        values = {name: batch[name] for name in given}
        values |= zip(names, runner.run(names, dict(batch)), strict=True)
        for name, array in values.items():
            if not isinstance(array, np.ndarray) or array.dtype != np.float32 or not array.size:
                continue
            if not np.isfinite(array).all():
                raise _not_finite(name)
            low, high = bounds.get(name, (0.0, 0.0))  # zero is always a code: padding puts it in
            bounds[name] = (min(low, float(array.min())), max(high, float(array.max())))
            kept.setdefault(name, []).append(array.ravel()[:: max(1, array.size * len(batches) // KEPT)].copy())
    return {name: _range(np.concatenate(kept[name]), *bounds[name]) for name in kept}


def _not_finite(name: str) -> InputError:
    return InputError(f"expected finite inputs to calibrate on, received some of which {name} is not finite")


def _range(values: Array, low: float, high: float) -> tuple[float, float]:
    """Return which of `SHARES` of the values' distribution errs least when they are rounded to 256 steps."""
    best, least = (low, high), inf
    for share in SHARES:
        first, last = (low, high) if share == 1 else map(float, np.quantile(values, [1 - share, share]))
        first, last = min(first, 0.0), max(last, 0.0)
        step = (last - first) / 255
        if step <= 0:
            continue
        zero = np.rint(-first / step)
        rounded = (np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step
        error = float(np.square(rounded - values, dtype=np.float64).sum())
        if error < least:
            best, least = (first, last), error
    return best


def _sorted(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its nodes in an order in which they can be run."""
    model = ir.from_proto(proto)
    model.graph.sort()
    return ir.to_proto(model)


def _name_codes(made: onnx.ModelProto, of: onnx.ModelProto) -> None:
    """Call codes by what they stand for where the quantizer copied a tensor, a bias of several layers, under a name."""
    own = {node.name: list(node.input) for node in of.graph.node}
    stored = {tensor.name for tensor in of.graph.initializer}
    decoded = {node.output[0]: node for node in made.graph.node if node.op_type == "DequantizeLinear"}
    tensors = {tensor.name: tensor for tensor in made.graph.initializer}
    for node in made.graph.node:
        for value, name in zip(node.input, own.get(node.name, ()), strict=False):
            codes = decoded[value].input[0] if value in decoded else ""
            if name in stored and codes in tensors and SUFFIX.sub("", codes) != name:
                names = (f"{name}_quantized.{number}" for number in count(1))
                decoded[value].input[0] = next(each for each in names if each not in tensors)
                tensors[decoded[value].input[0]] = tensor = tensors.pop(codes)
                tensor.name = decoded[value].input[0]


def _needless(found: Quantized, norms: Collection[str]) -> set[str]:
    """Return the pairs that would only make noise: of outputs, before an activation, and before a norm in float."""
    proto = found.proto
    outputs = {value.name for value in proto.graph.output}
    decoded = {output: value for value, pair in found.pairs.items() for output in pair.decoded}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            if name in decoded:
                readers.setdefault(decoded[name], []).append(node)
    float_alone = {
        value
        for value, nodes in readers.items()
        if all(node.op_type in ("Relu", "Clip") or node.name.rpartition("/")[0] in norms for node in nodes)
    }
    of_outputs = {value for value, pair in found.pairs.items() if outputs & {value, *pair.decoded}}
    return of_outputs | float_alone


def _with_biases(found: Quantized, dropped: set[str]) -> set[str]:
    """Return what is left in float, with the biases whose step is no longer that of an input and a weight."""
    decoded = {output: value for value, pair in found.pairs.items() for output in pair.decoded}
    more = set()
    for node in found.proto.graph.node:
        with_bias = len(node.input) > 2 and node.input[2] in found.stored and node.op_type in LINEAR
        if with_bias and (decoded.get(node.input[0]) in dropped or node.input[1] in dropped):
            more.add(node.input[2])
    return dropped | more


def _run(proto: onnx.ModelProto, batches: Sequence[Arrays]) -> list[list[Array]]:
    """Return all outputs of a model, output by output and batch by batch."""
    runner = session(proto.SerializeToString(), spinning=False)
    answers = [runner.run(None, dict(batch)) for batch in batches]
    return [list(output) for output in zip(*answers, strict=True)]


def _decibels(found: Sequence[Sequence[Array]], exact: Sequence[Sequence[Array]]) -> float:
    """Return how far the noise of the noisiest output is below it, of those whose shape rounding does not decide."""
    return min((decibels(*pair) for pair in zip(found, exact, strict=True) if comparable(*pair)), default=inf)


def _harmful(
    found: Quantized,
    weights: Mapping[str, Array],
    needless: set[str],
    batches: Sequence[Arrays],
    exact: Sequence[Sequence[Array]],
    report: Int8,
) -> set[str]:
    """Return what is left in float for its noise, the worst first, until the output has little: see `ENOUGH`, `HARM`.

    What was left is told in ``report``, and what noise there is then.
    """

    def noise(dropped: set[str], given: Sequence[Arrays], of_float: Sequence[Sequence[Array]]) -> float:
        return _decibels(_run(found.without(weights, _with_biases(found, dropped)), given), of_float)

    left: set[str] = set()
    report.noise_db = noise(needless, batches, exact)
    if report.noise_db >= ENOUGH:
        return left
    biases = {name for name, stored in found.stored.items() if stored.codes.dtype == np.int32}
    units = [name for name in found.names if name not in needless | biases]
    few, of_few = batches[:TRIALS], [output[:TRIALS] for output in exact]
    alone = {name: noise(set(found.names) - {name}, few, of_few) for name in units}
    for name in sorted(units, key=alone.__getitem__)[: ceil(MOST_LEFT * len(units))]:
        if report.noise_db >= ENOUGH or alone[name] >= HARM:
            break
        left.add(name)
        report.left[found.stored[name].name if name in found.stored else name] = round(alone[name], 1)
        report.noise_db = noise(needless | left, batches, exact)
    return left
