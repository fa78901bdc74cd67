"""What is said of a file: each output of each run against the bounds, and what came of it all."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .reference import scale_of

Array = NDArray[Any]

TOLERANCE = 1e-5
"""Largest difference to the framework, relative to the output's scale: correct files gave at most 5.5e-6."""

LAYER = 3e-5
"""The same for a layer: onnxruntime normalizes large groups to within 1.1e-5, which the outputs average out."""

HALF_TOLERANCE = 1e-2
"""The same for the outputs of a file in float16: rounding alone gave up to 1.8e-3 on 10 networks of 3 norms each."""

HALF_LAYER = 5e-2
"""The same for a layer of such a file, where the same networks gave up to 1.1e-2."""

INEXACT = 3e-6
"""The framework's own float32 error, relative to scale, from which the model counts as ill-conditioned on an input."""

ERRORS = 10.0
"""Largest error against float64 where the model is ill-conditioned, relative to the framework's own."""

MOST = 1e-3
"""Largest error against float64 whatever the framework's own: beyond it, float32 decides nothing."""

_NOISE = 1e-6


@dataclass(frozen=True)
class Check:
    """One output of one run: the largest difference to the framework, absolute and relative to scale.

    ``inputs`` are ``x0.1`` (standard normal, scaled), ``example``, ``data``, or ``drawn``: made of these.
    ``own`` is the framework's float32 error relative
    to scale, ``ratio`` the file's error over it, both against float64; None where they were not asked for or there
    is no such reference.
    """

    output: str
    batch: int
    inputs: str
    provider: str
    optimisation: str
    max_abs: float
    max_rel: float
    finite: bool
    tolerance: float
    own: float | None = None
    ratio: float | None = None
    runtime: str = "onnxruntime"

    @property
    def passed(self) -> bool:
        """Whether the output is finite and within its tolerance, or as near float64 as an inexact model allows."""
        return self.finite and (self.max_rel <= self.tolerance or self._excused)

    @property
    def _excused(self) -> bool:
        return self.own is not None and self.ratio is not None and excused(self.own, self.ratio)

    def __str__(self) -> str:
        what = f"differs by {self.max_rel:.2g} of its scale" if self.finite else "is not finite"
        ratio = "" if self.ratio is None else f", {self.ratio:.2g} times the framework's own error"
        inputs = "" if self.inputs == "x1" else f", inputs {self.inputs}"
        where = [*([] if self.runtime == "onnxruntime" else [self.runtime]),
                 *([] if self.provider == "cpu" else [self.provider])]  # fmt: skip
        run = ", ".join([f"batch {self.batch}{inputs}", *where, f"optimisation {self.optimisation}"])
        return f"{self.output} {what}{ratio} ({run})"


@dataclass(frozen=True)
class Ran:
    """A runtime that a file was run in, the precision it was set to, and what it does where nothing is set.

    ``default_max_rel`` is the largest difference at its ``default_precision``, relative to an output's scale; None if
    it failed at that.
    """

    name: str
    version: str
    precision: str
    default_precision: str
    default_max_rel: float | None


@dataclass(frozen=True)
class Verdict:
    """Whether a file computes what a model computes, with the figures; false in a condition where it does not.

    ``coverage`` has for each embedding how many of its rows the inputs reached, and how many it has: what the proof
    says nothing of are the others. ``runtimes`` are those that the file was run in, each of which has to compute it.
    """

    checks: tuple[Check, ...]
    problems: tuple[str, ...] = ()
    first_diverging: str | None = None
    notes: tuple[str, ...] = ()
    first_infinite: str | None = None
    coverage: dict[str, tuple[int, int]] = field(default_factory=dict)
    runtimes: tuple[Ran, ...] = ()

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

    @property
    def worst(self) -> list[Check]:
        """The failed check with the largest difference of each output, at most eight."""
        worst: dict[str, Check] = {}
        for check in self.checks:
            if not check.passed and (check.output not in worst or check.max_rel > worst[check.output].max_rel):
                worst[check.output] = check
        return list(worst.values())[:8]

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return self.explain()

    def explain(self, path: str = "a file") -> str:
        """Return what the file passed, or why it failed, for people."""
        if self.passed:
            passed = f"passed: {len(self.checks)} checks, largest difference {self.max_rel:.1e} of scale"
            covered = [f"{name}: {reached} of {rows} rows reached" for name, (reached, rows) in self.coverage.items()]
            return "\n".join([*(f"note: {note}" for note in self.notes), *covered, *self._by_runtime, passed])
        failed = [check for check in self.checks if not check.passed]
        lines = [*self.problems, *map(str, self.worst)]
        if failed:
            lines.append(f"{len(failed)} of {len(self.checks)} checks failed")
        if self.first_diverging:
            lines.append(f"first diverging layer: {self.first_diverging}")
        if self.first_infinite:
            lines.append(f"first value that is not finite: {self.first_infinite}")
        own = max((check.own or 0.0 for check in failed), default=0.0)
        if own > MOST / ERRORS:
            lines.append(f"the model itself is off by {own:.2g} in float32: its outputs are not determined there")
        if failed and self.max_rel <= 1:
            allowed = min(check.tolerance for check in failed)
            lines.append(f"a tolerance of {self.max_rel:.2g} would pass; {allowed:g} is allowed")
        lines += [*self._by_runtime, *(f"note: {note}" for note in self.notes)]
        listing = "\n".join(f"  {line}" for line in lines)
        return f"expected {path} to compute what the model computes, received a file that does not:\n{listing}"

    @property
    def _by_runtime(self) -> list[str]:
        """A line for each runtime, unless there is onnxruntime alone, of which all else tells."""
        if all(ran.name == "onnxruntime" for ran in self.runtimes):
            return []
        lines = []
        for ran, facts in zip(self.runtimes, self._runtimes(), strict=True):
            by_default = ran.default_precision
            if by_default != ran.precision:
                by_default += " fails" if ran.default_max_rel is None else f" {ran.default_max_rel:.1e}"
                by_default = f"; at its default precision {by_default}"
            else:
                by_default = ""
            apart = f"largest difference {facts['max_rel']:.1e} of scale" if facts["checks"] else "none passed"
            lines.append(f"{ran.name} {ran.version} in {ran.precision}: {facts['checks']} checks, {apart}{by_default}")
        return lines

    def _runtimes(self) -> list[dict[str, Any]]:
        """Return what was found in each runtime, as plain data."""
        return [
            asdict(ran)
            | {
                "checks": len(own := [check for check in self.checks if check.runtime == ran.name]),
                "failed": sum(not check.passed for check in own),
                "max_rel": max((check.max_rel for check in own), default=float("nan")),
            }
            for ran in self.runtimes
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data."""
        return {
            "passed": self.passed,
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "first_diverging": self.first_diverging,
            "first_infinite": self.first_infinite,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "coverage": {name: {"reached": r, "rows": rows} for name, (r, rows) in self.coverage.items()},
            "runtimes": self._runtimes(),
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
        }


def joined(verdicts: Sequence[Verdict]) -> Verdict:
    """Return what several runtimes have to say of one file as one verdict."""
    return Verdict(
        tuple(check for verdict in verdicts for check in verdict.checks),
        tuple(dict.fromkeys(problem for verdict in verdicts for problem in verdict.problems)),
        next((verdict.first_diverging for verdict in verdicts if verdict.first_diverging), None),
        tuple(dict.fromkeys(note for verdict in verdicts for note in verdict.notes)),
        next((verdict.first_infinite for verdict in verdicts if verdict.first_infinite), None),
        verdicts[0].coverage,
        tuple(ran for verdict in verdicts for ran in verdict.runtimes),
    )


def excused(own: float, ratio: float) -> bool:
    """Return whether a model is ill-conditioned on an input, and a file that errs by that ratio no worse than it."""
    return own >= INEXACT and ratio <= ERRORS and ratio * own <= MOST


def compare(found: Array, expected: Array, exact: Array | None = None, error: float = 0.0) -> dict[str, Any]:
    """Return the figures of a `Check`: how far an array is from the framework's, and both from float64.

    ``error`` is one of the framework's own that is known besides.
    """
    if found.shape != expected.shape:
        return {"max_abs": float("inf"), "max_rel": float("inf"), "finite": False}
    finite = bool(np.isfinite(found).all() and np.isfinite(expected).all())
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    scale = scale_of(expected) if finite else 1.0
    difference = _apart(found, expected) if finite else float("inf")
    figures: dict[str, Any] = {"max_abs": difference, "max_rel": difference / scale, "finite": finite}
    if exact is not None and exact.shape == expected.shape and finite:
        own = max(_apart(expected, exact), error) / scale
        figures |= {"own": own, "ratio": _apart(found, exact) / scale / max(own, _NOISE)}
    return figures


def _apart(first: Array, second: Array) -> float:
    return float(np.abs(first - second).max(initial=0.0))


def unequal(names: Sequence[str], others: Sequence[str], what: str) -> list[str]:
    """Return a problem if two lists of names differ."""
    return [] if list(names) == list(others) else [f"expected the {what} {_list(names)}, received {_list(others)}"]


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
