"""What `zoo.py` asks of one network, in PyTorch and in Keras."""

import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import onnxruntime
import peers
import zoos
from zoo import TARGETS, Row
from zoo_subjects import Subject, subject_of
from zoos import Network

import normswap
from normswap import SwitchNorm
from normswap.errors import NormswapError

_SPELLED = {"sn frozen": SwitchNorm(batch_statistics="frozen")}


def run(key: str, asked: Sequence[str]) -> None:
    """Ask of one network the checks of these names for every target, and print its row as JSON."""
    warnings.simplefilter("ignore")
    peers.make_importable(peers.ZOO)
    library, _, name = key.partition(":")
    if library in ("torchvision", "ultralytics"):
        peers.run_detectors()
    row, start = Row(library, name, asked=list(asked)), time.process_time()
    build = zoos.networks(library)[name]
    try:
        subject = subject_of(build, seed=0)
        before = subject.outputs()
    except Exception as error:
        row.error = f"{type(error).__name__}: {error}"[:500]
        print(json.dumps(asdict(row)))
        return
    row.batch_norms = len(subject.norms())
    lacking = _without_gradient(build) if row.batch_norms and "train" in asked else None
    for target in TARGETS if row.batch_norms else ():
        row.checks[target] = dict(_checked(build, subject, before, target, lacking, row))
        if (problem := row.checks[target].get("export")) and _own_export_fails(build):
            del row.checks[target]["export"]
            row.notes.append(f"no file for {target}, nor by the framework's own exporter: {problem}")
        if not row.replaced[target]:
            del row.checks[target]
    row.seconds = round(time.process_time() - start, 1)
    print(json.dumps(asdict(row)))


def _checked(
    build: Callable[[], Network],
    subject: Subject,
    before: list[np.ndarray],
    target: str,
    lacking: set[str] | None,
    row: Row,
) -> Iterator[tuple[str, str]]:
    """Yield each check with what went wrong."""
    spelled, state = _SPELLED.get(target, target), subject.weights()
    row.replaced.setdefault(target, 0)
    example = subject.example
    try:
        plan = normswap.plan(subject.model, spelled, example=example)
        row.replaced[target] = sum(decision.action == "replace" for decision in plan.decisions)
        row.notes = sorted({*row.notes, *(decision.note for decision in plan.decisions if decision.note)})
        sites = {name for d in plan.decisions for name in (d.site.name, *d.site.aliases)}
        left = set(subject.norms()) - sites - {name.rpartition("/")[2] for name in sites}
        unexplained = sorted(left) + [d.site.name for d in plan.decisions if d.action != "replace" and not d.note]
        yield "plan", f"not in the plan or without a reason: {', '.join(unexplained)}" if unexplained else ""
    except Exception as error:
        row.replaced[target] = max(row.replaced[target], 1)
        yield "plan", _told(error)
        return
    if not row.replaced[target]:
        return
    try:
        report = normswap.patch(subject.model, spelled, example=example)
        planned = row.replaced[target]
        yield "patch", "" if len(report.replaced) == planned else f"{len(report.replaced)} replaced, {planned} planned"
    except Exception as error:
        yield "patch", _told(error)
        return
    checks = {
        "eval": lambda: _evaluated(subject, before, target),
        "export": lambda: _exported(subject),
        "bundle": lambda: _stored(build, subject, report),
        "undo": lambda: _undone(subject, report, before, state),
        "train": lambda: _trained(build, spelled, lacking or set()),
    }
    left_out = {check for check, out in {"export": target == "sn frozen", "train": lacking is None}.items() if out}
    for check in (check for check in checks if check in row.asked and check not in left_out):
        yield check, _attempt(checks[check])
    if "undo" not in row.asked:
        report.undo()


def _evaluated(subject: Subject, before: list[np.ndarray], target: str) -> str:
    after = subject.outputs()
    if len(after) != len(before):
        return f"{len(after)} outputs, {len(before)} before"
    if all(np.isfinite(y).all() for y in before) and not all(np.isfinite(y).all() for y in after):
        return "not finite"
    if target == "brn" and not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(after, before, strict=True)):
        return f"differs by {max(float(np.abs(a - b).max()) for a, b in zip(after, before, strict=True)):.1e}"
    return ""


def _exported(subject: Subject) -> str:
    """Write the file and prove it: `to_onnx` raises what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        normswap.to_onnx(subject.model, f"{folder}/model.onnx", example=subject.example)
    return ""


def _own_export_fails(build: Callable[[], Network]) -> bool:
    """Return whether the framework's own exporter writes no file that loads, at the example's sizes."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            subject_of(build, seed=0).export(f"{folder}/model.onnx")
            onnxruntime.InferenceSession(f"{folder}/model.onnx")
    except Exception:
        return True
    return False


def _stored(build: Callable[[], Network], subject: Subject, report: Any) -> str:
    expected = subject.outputs()
    with tempfile.TemporaryDirectory() as folder:
        normswap.save(report, f"{folder}/bundle")
        fresh = subject_of(build, seed=1)
        fresh.model = normswap.load(f"{folder}/bundle", model=fresh.model)
        fresh.example = subject.example
        loaded = fresh.outputs()
    if all(np.array_equal(a, b, equal_nan=True) for a, b in zip(loaded, expected, strict=True)):
        return ""
    differing = [name for name, value in subject.weights().items() if not _same(value, fresh.weights().get(name))]
    largest = max(float(np.abs(a - b).max()) for a, b in zip(loaded, expected, strict=True) if a.size)
    if not differing and _keeps_more_than_its_state(build):
        return ""
    return f"loaded, it differs by {largest:.1e}; state: {', '.join(differing) or 'the same'}"


def _keeps_more_than_its_state(build: Callable[[], Network]) -> bool:
    """Return whether the network with its BatchNorms, given another's state, computes something else than that one."""
    one, other = subject_of(build, seed=0), subject_of(build, seed=1)
    other.example = one.example
    other.put(one.weights())
    return not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one.outputs(), other.outputs(), strict=True))


def _without_gradient(build: Callable[[], Network]) -> set[str] | None:
    """Return the weights that one step of the untouched network gives no finite gradient; None if it takes no step."""
    try:
        return set(subject_of(build, seed=0).step())
    except Exception:
        return None


def _trained(build: Callable[[], Network], target: Any, lacking: set[str]) -> str:
    subject = subject_of(build, seed=0)
    normswap.patch(subject.model, target, example=subject.example)
    asleep = {name.rpartition(".")[0] for name in lacking}  # layers that nothing of the loss depends on
    if without := sorted(name for name in {*subject.step()} - lacking if name.rpartition(".")[0] not in asleep):
        return f"no finite gradient: {', '.join(without[:5])}"
    return "" if all(np.isfinite(y).all() for y in subject.outputs()) else "not finite after a step"


def _undone(subject: Subject, report: Any, before: list[np.ndarray], state: dict[str, np.ndarray]) -> str:
    report.undo()
    after = subject.weights()
    if differing := sorted(name for name in {*after, *state} if not _same(after.get(name), state.get(name))):
        return f"other weights: {', '.join(differing[:5])}"
    if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(subject.outputs(), before, strict=True)):
        return "computes something else"
    return ""


def _attempt(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as error:
        return _told(error)


def _told(error: Exception) -> str:
    raw = "" if isinstance(error, NormswapError) else f"{type(error).__name__}: "
    return f"{raw}{error}"[:400] or type(error).__name__


def _same(a: Any, b: Any) -> bool:
    return a is not None and b is not None and np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f")
