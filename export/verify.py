"""The proof that an ONNX file computes what a model computes.

The file is run in onnxruntime with graph optimisation off and on, at several batch sizes, on random inputs and on
data where given. An output passes if it is finite, differs from the framework's by at most 1e-5 of its largest
value, and is no further than 10 times the framework's own float32 error from a float64 copy of the model. Bounds
relative to the output's scale hold for any input scale, where absolute ones fail correct models.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from ..errors import InputError
from ..sources.files import require_file
from ..sources.framework import framework_of

Array = NDArray[Any]

TOLERANCE = 1e-5
"""Largest difference to the framework, relative to the output's scale: correct exports stay below 2.3e-6."""

ILL_CONDITIONED = 10.0
"""Largest error against float64, relative to the framework's own."""

FLOAT32_NOISE = 1e-6
"""What the framework's float32 error is taken to be at least, relative to the output's scale."""

BATCH_SIZES = (1, 2, 5, 7)
_LEVELS = {
    "off": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "on": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@dataclass(frozen=True)
class Check:
    """One output of one run: the largest difference to the framework, absolute and relative to scale.

    ``ratio`` is the file's error over the framework's float32 error, both against float64; None without that
    reference.
    """

    output: str
    batch: int
    optimisation: str
    max_abs: float
    max_rel: float
    finite: bool
    ratio: float | None

    @property
    def passed(self) -> bool:
        """Whether all three conditions hold."""
        return self.finite and self.max_rel <= TOLERANCE and (self.ratio is None or self.ratio <= ILL_CONDITIONED)


@dataclass(frozen=True)
class Verdict:
    """Whether a file computes what a model computes, with the figures; false in a condition where it does not."""

    checks: tuple[Check, ...]
    problems: tuple[str, ...] = ()
    first_diverging: str | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether there is no problem, every check passed, and every recorded layer computes the same."""
        right = bool(self.checks) and all(check.passed for check in self.checks)
        return right and not self.problems and self.first_diverging is None

    @property
    def max_abs(self) -> float:
        """Largest absolute difference of any check."""
        return max((check.max_abs for check in self.checks), default=float("nan"))

    @property
    def max_rel(self) -> float:
        """Largest difference of any check relative to its output's scale."""
        return max((check.max_rel for check in self.checks), default=float("nan"))

    def __bool__(self) -> bool:
        return self.passed

    def explain(self, path: str) -> str:
        """Return why the file failed, for an error message."""
        lines = [*self.problems]
        failed = [check for check in self.checks if not check.passed]
        for check in failed[:4]:
            what = f"differs by {check.max_rel:.2g} of its scale" if check.finite else "is not finite"
            ratio = "" if check.ratio is None else f", {check.ratio:.2g} times the framework's own error"
            lines.append(f"{check.output} {what}{ratio} (batch {check.batch}, optimisation {check.optimisation})")
        if self.first_diverging:
            lines.append(f"first diverging layer: {self.first_diverging}")
        if failed and self.max_rel <= 1:
            lines.append(f"a tolerance of {self.max_rel:.2g} would pass; {TOLERANCE:g} is allowed")
        listing = "\n".join(f"  {line}" for line in lines)
        return f"expected {path} to compute what the model computes, received a file that does not:\n{listing}"

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data."""
        return {
            "passed": self.passed,
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "first_diverging": self.first_diverging,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
        }


def verify(
    model: Any,
    path: str | Path,
    *,
    data: Sequence[Array] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seed: int = 0,
) -> Verdict:
    """Hold an ONNX file against the model it was made from; the verdict is true if the file passes.

    Random inputs are standard normal at each of ``batch_sizes``, or at the one the file is fixed to; ``data`` are
    further inputs (N, ...) for a model of one input. On a miss the verdict names the first layer, in call order,
    whose output differs.

    Raises `InputError` if the file is not an ONNX model.
    """
    path = Path(path)
    proto = read_model(path)
    adapter = import_module(f".{framework_of(model)}", __package__)
    sessions = {name: session(path, level) for name, level in _LEVELS.items()}
    inputs = sessions["off"].get_inputs()
    rng = np.random.default_rng(seed)
    fixed = [entry.shape[0] for entry in inputs if entry.shape and isinstance(entry.shape[0], int)]
    batches = [[_random(rng, entry, size) for entry in inputs] for size in fixed[:1] or batch_sizes]
    batches += [[np.ascontiguousarray(array)] for array in data]

    checks: list[Check] = []
    suspect: _Reference | None = None
    twin, notes = _twin(adapter, model)
    for arrays in batches:
        try:
            outputs, sites = adapter.run(model, arrays)
        except Exception as error:
            problem = f"the model does not accept the file's inputs ({_describe(inputs)}): {error}"
            return Verdict((), (problem,))
        if problems := _interface_problems(outputs, sessions["off"]):
            return Verdict((), tuple(problems))
        exact = _exact(adapter, twin, arrays)
        for level, runner in sessions.items():
            found = dict(zip(outputs, _run(runner, arrays), strict=True))
            new = [
                _compare(name, len(arrays[0]), level, found[name], outputs[name], exact.get(name)) for name in outputs
            ]
            first_miss = all(check.passed for check in checks) and not all(check.passed for check in new)
            if suspect is None or first_miss:
                suspect = _Reference(arrays, outputs, sites, exact)
            checks += new
    diverging = None if suspect is None else _first_diverging(proto, suspect)
    return Verdict(tuple(checks), (), diverging, tuple(notes))


def read_model(path: Path) -> onnx.ModelProto:
    """Return the file's model after the full checker; raises `InputError` if it is not a valid ONNX model."""
    require_file(path)
    try:
        proto = onnx.load(path)
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"expected an ONNX model in {path}, received a file that is not valid: {reason}") from None
    return proto


def session(
    model: Path | bytes,
    level: Any = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    threads: int = 0,
) -> onnxruntime.InferenceSession:
    """Return an onnxruntime session on the CPU; raises `InputError` if onnxruntime refuses the model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"expected a model onnxruntime can load, received one it refuses: {error}") from None


def metadata(proto: onnx.ModelProto) -> dict[str, Any]:
    """Return what normswap stored in the file, by name, parsed."""
    prefix = "normswap."
    return {
        entry.key.removeprefix(prefix): json.loads(entry.value)
        for entry in proto.metadata_props
        if entry.key.startswith(prefix)
    }


def _compare(name: str, batch: int, level: str, found: Array, expected: Array, exact: Array | None) -> Check:
    if found.shape != expected.shape:
        return Check(name, batch, level, float("inf"), float("inf"), False, None)
    finite = bool(np.isfinite(found).all() and np.isfinite(expected).all())
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    scale = max(float(np.abs(expected).max(initial=0.0)), float(np.finfo(np.float32).tiny))
    difference = float(np.abs(found - expected).max(initial=0.0)) if finite else float("inf")
    ratio = None
    if exact is not None and finite:
        own = float(np.abs(expected - exact).max(initial=0.0))
        ratio = float(np.abs(found - exact).max(initial=0.0)) / max(own, FLOAT32_NOISE * scale)
    return Check(name, batch, level, difference, difference / scale, finite, ratio)


@dataclass(frozen=True)
class _Reference:
    """What the framework computed on one batch: outputs, layers' outputs, and both in float64 where it can."""

    arrays: list[Array]
    outputs: dict[str, Array]
    sites: dict[str, Array]
    exact: dict[str, Array]


def _first_diverging(proto: onnx.ModelProto, reference: _Reference) -> str | None:
    """Return the first layer in call order whose output differs, else the first graph output that does.

    A layer may differ where the outputs do not, as a scaled convolution before a GroupNorm.
    """
    produced = {value for node in proto.graph.node for value in node.output}
    values = {site: value for site, value in metadata(proto).get("sites", {}).items() if value in produced}
    own = {value.name for value in proto.graph.output}
    extended = onnx.ModelProto()
    extended.CopyFrom(proto)
    extended.graph.output.extend(onnx.ValueInfoProto(name=value) for value in sorted(set(values.values()) - own))
    runner = session(extended.SerializeToString(), _LEVELS["off"])
    found = dict(zip((output.name for output in runner.get_outputs()), _run(runner, reference.arrays), strict=True))
    recorded = {site: array for site, array in reference.sites.items() if site in values}
    batch = len(reference.arrays[0])
    for name, array in (recorded | reference.outputs).items():
        check = _compare(name, batch, "off", found[values.get(name, name)], array, reference.exact.get(name))
        excused = name in values and check.ratio is not None and check.ratio <= ILL_CONDITIONED
        if not check.finite or not (check.passed or excused):
            return name
    return None


def _interface_problems(outputs: Mapping[str, Array], runner: onnxruntime.InferenceSession) -> list[str]:
    names = [output.name for output in runner.get_outputs()]
    if names != list(outputs):
        return [f"expected the outputs {', '.join(outputs)}, received {', '.join(names)}"]
    return []


def _twin(adapter: ModuleType, model: Any) -> tuple[Any, list[str]]:
    """Return a float64 copy of the model, or None and a note why there is none."""
    try:
        return adapter.in_double(model), []
    except Exception as error:
        return None, [f"no float64 reference: {(str(error).splitlines() or [type(error).__name__])[0]}"]


def _exact(adapter: ModuleType, twin: Any, arrays: list[Array]) -> dict[str, Array]:
    """Return what the float64 copy computes, outputs and layers, or nothing where there is no copy."""
    if twin is None:
        return {}
    wide = [array.astype(np.float64) if array.dtype == np.float32 else array for array in arrays]
    outputs, sites = adapter.run(twin, wide)
    return {**sites, **outputs}


def _run(runner: onnxruntime.InferenceSession, arrays: list[Array]) -> list[Array]:
    feed = {entry.name: array for entry, array in zip(runner.get_inputs(), arrays, strict=True)}
    try:
        results: list[Array] = runner.run(None, feed)
    except Exception as error:
        raise InputError(f"expected a model onnxruntime can run, received one on which it fails: {error}") from None
    return results


_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def _random(rng: np.random.Generator, entry: Any, batch: int) -> Array:
    shape = [batch, *(size if isinstance(size, int) else 32 for size in entry.shape[1:])]
    if entry.type not in _DTYPES:
        raise InputError(f"expected inputs of {', '.join(_DTYPES)}, received {entry.name} of {entry.type}")
    dtype = _DTYPES[entry.type]
    if dtype == np.float32:
        return rng.standard_normal(shape, np.float32)
    return rng.integers(0, 2, shape).astype(dtype)


def _describe(inputs: Sequence[Any]) -> str:
    return ", ".join(f"{entry.name} {entry.shape}" for entry in inputs)
