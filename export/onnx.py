"""A model to a folded, cleaned and proven ONNX file."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from onnxscript import version_converter

from .. import __version__
from ..errors import InputError, UnsupportedError, UsageError, VerificationError, named, spoken
from ..frameworks import several
from ..frameworks.detect import framework_of, get_framework
from ..frameworks.example import Inputs, to_array
from ..frameworks.names import unique
from ..sources.outputs import staged
from ..verification.reference import drawn_example
from ..verification.verdict import Verdict
from ..verification.verify import verify
from .contract import tracer_of
from .dimensions import shape_of
from .fold import Fold, fold_batch_norms, simplify
from .forms import RUNTIMES, Form, Runtime, choose, write_norm
from .half import to_half
from .int8 import Int8, in_int8
from .names import part, settle
from .traced import Traced

Array = NDArray[Any]

LOWEST_IR = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12}
"""The lowest IR version that is legal for an opset: older runtimes refuse newer ones."""

ONE_FILE = 2**31 - 2**20
"""Most bytes of weights in the file itself, of which protobuf allows 2 GiB; beyond, they lie beside it."""


ROUNDINGS = 1e-2
"""Largest miss, relative to scale, that is tried again: beyond it, it is a wrong graph and no rounding."""


@dataclass(frozen=True)
class ExportReport:
    """What was written: the file, each norm folded or kept (with the reason), node count, size, and the verdict.

    ``inputs`` are the shapes that the file takes, with a name for each size that is open; ``int8`` tells of an int8
    file how many layers were quantized, what was left in float for its noise, and how much of that there is.
    """

    output: Path
    inputs: dict[str, list[int | str | None]]
    folded: dict[str, str]
    kept: dict[str, str]
    nodes: int
    size: int
    verdict: Verdict | None
    notes: list[str] = field(default_factory=list)
    int8: Int8 | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "output": str(self.output),
            "inputs": self.inputs,
            "folded": self.folded,
            "kept": self.kept,
            "nodes": self.nodes,
            "bytes": self.size,
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
            "notes": self.notes,
            "int8": None if self.int8 is None else self.int8.to_dict(),
        }


def to_onnx(
    model: Any,
    path: str | Path,
    *,
    example: Any = None,
    data: Any = None,
    opset: int = 20,
    runtime: Runtime = "portable",
    dynamic_size: bool = False,
    half: bool = False,
    int8: Any = None,
    prune_gates: float = 0.0,
    overwrite: bool = False,
    check: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write ``model`` in inference mode to an ONNX file, its norms folded or in constant form, and prove the file.

    The file's batch dimension is free unless the model fixes it, which the report says. No file is left on an error.

    Args:
        model: A patched model, or any other of PyTorch or Keras, with float32 weights.
        path: File to write. Weights over 2 GB go into ``path`` + ".data", or ".1.data" where that is taken.
        example: What the model takes: a tensor or array (N, ...), a tuple of arguments, a mapping of keyword arguments,
            or `normswap.Inputs`; a Keras model that knows its input shapes needs none. The file is proved on it.
        data: Further batches to prove the file on, each as an example.
        opset: Version of the operator set, from 17 to 24.
        runtime: ``"portable"`` for operators every runtime knows, ``"ort"`` for what onnxruntime runs fastest, or
            ``"web"`` for shorter sums, of which onnxruntime-web needs them.
        dynamic_size: Leave height and width free too.
        half: Store weights and compute in float16, but for norms, inputs and outputs.
        int8: Batches of inputs, each as an example, 16 samples or more together, to calibrate an int8 file on: weights
            of convolutions and dense layers in int8, what they read in uint8, norms that take statistics in float.
        prune_gates: Leave out a statistic of a Switchable Normalization whose gate is below this, from 0 to below 1/3;
            the report's notes say which, and how far the output moves.
        overwrite: Replace a file that is there.
        check: Verify the file before it gets its name.
        metadata: Stored in the file as JSON under ``normswap.NAME``.

    Returns:
        The `ExportReport`: which norms were ``folded`` into what, which were ``kept`` and why, the shapes of the
        ``inputs``, and the ``verdict``.

    Raises:
        UnsupportedError: For a model, dtype or opset that cannot be exported.
        UsageError: For ``half`` and ``int8`` together.
        InputError: For a setting out of its range, inputs to calibrate on that are too few or do not fit, and without
            an example where one is needed.
        VerificationError: If the file computes something else than the model.
        OutputExistsError: If ``path`` exists.

    Example:
        >>> import normswap, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> report = normswap.patch(model, "brn")
        >>> written = normswap.to_onnx(model, "net.onnx", example=torch.randn(2, 3, 8, 8))
        >>> written.folded, bool(written.verdict)
        ({'1': 'Conv'}, True)
    """
    path = Path(path)
    if opset not in LOWEST_IR:
        low, high = min(LOWEST_IR), max(LOWEST_IR)
        raise UnsupportedError(f"expected an opset from {low} to {high}, received opset={opset}")
    if runtime not in RUNTIMES:
        raise InputError(f"expected a runtime out of {', '.join(RUNTIMES)}, received runtime={runtime!r}")
    if not 0 <= prune_gates < 1 / 3:
        raise InputError(f"expected `prune_gates` from 0 to below 1/3, received prune_gates={prune_gates}")
    if half and int8 is not None:
        raise UsageError(f"expected one of {named('half')} and {named('int8')}, received both")
    tracer = tracer_of(model)
    if problem := tracer.refusal(model):
        raise UnsupportedError(problem)
    inputs = example_or_drawn(model, example)
    data = None if data is None else several.batches(data)  # which is looked at once for each proof
    notes = tracer.notes(model)
    weights, before = _weights_name(path), _weights_of(path)
    with staged(path, overwrite=overwrite) as temporary, _pruned(model, inputs, prune_gates, notes):
        for careful in (False, True):
            traced = tracer.trace(model, inputs, opset=opset, dynamic=dynamic_size)
            declared = [value.shape for value in traced.model.graph.outputs]
            folds, forms = _write(traced, runtime, careful=careful)
            facts = tracer.norm_facts(model)
            for name, form in forms.items():
                facts.setdefault(name.partition("#")[0], {})["form"] = form
            stored = {"framework": framework_of(model), "norms": facts, "sites": traced.sites, **(metadata or {})}
            stored |= {"prune_gates": float(prune_gates)} if prune_gates else {}
            stored["inputs"] = dict(zip(traced.inputs, map(shape_of, traced.model.graph.inputs), strict=True))
            _clean(traced.model, stored, opset)
            if half:
                to_half(traced.model, forms)
            part(traced.model.graph)
            for value, shape in zip(traced.model.graph.outputs, declared, strict=True):
                value.shape = shape or value.shape  # as the model has it; what was inferred since may be wrong
            settle(traced.model.graph, traced.inputs, traced.outputs)
            _save(traced.model, temporary, weights)
            verdict = verify(model, temporary, example=inputs, data=data) if check else None
            if verdict is None or verdict or careful or not _curable(verdict, traced, forms):
                break
            notes.append(
                f"written again with every norm centred: as fast as can be, it was off by {verdict.max_rel:.1e}"
            )
        if verdict is not None and not verdict:
            raise VerificationError(verdict.explain(str(path)))
        quantized = None
        if int8 is not None:
            quantized, verdict = in_int8(model, temporary, inputs, int8, set(forms), data=data, check=check)
            if verdict is not None and not verdict:
                raise VerificationError(verdict.explain(str(path)))
            notes += quantized.notes
        if verdict is not None:
            tolerance = max(check.tolerance for check in verdict.checks)
            _record(temporary, {"passed": True, "checks": len(verdict.checks), "tolerance": tolerance})
        size = sum(file.stat().st_size for file in temporary.parent.iterdir())
    for name in before - {weights}:  # of the file that was replaced
        path.with_name(name).unlink(missing_ok=True)
    folded, kept = _norm_report(traced, folds, forms)
    notes += traced.notes
    graph = traced.model.graph
    nodes = sum(1 for _ in graph) if quantized is None else quantized.nodes
    return ExportReport(path, _shapes(graph), folded, kept, nodes, size, verdict, notes, quantized)


def example_or_drawn(model: Any, example: Any) -> Inputs:
    """Return the inputs to trace with; drawn for what the model says of them if there is no example."""
    if example is not None:
        return get_framework(model).ordered(model, Inputs.of(example)).map(to_array)
    found = drawn_example(model)
    if found is None:
        wanted = spoken("--input-shape, or --example,", "an example input")
        raise InputError(f"expected {wanted} to export, received {spoken('none', f'example={example}')}")
    return found


def _curable(verdict: Verdict, traced: Traced, forms: Mapping[str, Form]) -> bool:
    """Whether centring may cure a miss: one that is small, at or behind a norm that is not centred yet."""
    roundings = not verdict.problems and all(check.finite for check in verdict.checks) and verdict.max_rel <= ROUNDINGS
    spatial = [norm.name for norm in traced.norms.values() if norm.spatial]
    plain = {name for name in spatial if forms.get(name, "centred") != "centred"}
    until: list[str] = []
    for site in traced.sites:
        until.append(site)
        if site == verdict.first_diverging:
            break
    return roundings and any(name in plain for name in until)


@contextmanager
def _pruned(model: Any, inputs: Inputs, threshold: float, notes: list[str]) -> Iterator[None]:
    """Close the gates below ``threshold`` for the time being; note which, and what it does to the output."""
    if threshold == 0:
        yield
        return
    framework = get_framework(model)
    before, _ = framework.record(model, inputs)
    with tracer_of(model).prune(model, threshold) as dropped:
        after, _ = framework.record(model, inputs)
        moved = max(float(np.abs(after[k] - before[k]).max() / max(np.abs(before[k]).max(), 1e-30)) for k in before)
        for gates in sorted({tuple(gates) for gates in dropped.values()}):
            names = ", ".join(name for name, own in dropped.items() if tuple(own) == gates)
            notes.append(f"left out the {', '.join(gates)} gates of {names}")
        notes.append(f"{len(dropped)} norms pruned: the output on the example moves by {moved:.1e} of its scale")
        yield


def _write(traced: Traced, runtime: Runtime, *, careful: bool) -> tuple[list[Fold], dict[str, Form]]:
    """Write the norms in place and fold those of constant statistics; return what became of each."""
    model = traced.model
    forms: dict[str, Form] = {}

    def write(constant: bool) -> None:
        for node, norm in traced.norms.items():
            if node.graph is not None and (choose(norm) == "batch") == constant:
                forms[norm.name] = write_norm(model, node, norm, runtime=runtime, careful=careful)

    write(constant=True)
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    located = {site: values[name] for site, name in traced.sites.items() if name in values}
    simplify(model)
    _name_sites(traced, located)
    folds = fold_batch_norms(model)
    write(constant=False)
    simplify(model)
    for domain in set(model.opset_imports) - {node.domain for node in model.graph}:
        del model.opset_imports[domain]
    alive = {value.name for node in model.graph for value in node.outputs}
    traced.sites = {site: value for site, value in traced.sites.items() if value in alive}
    return folds, {name: form for name, form in forms.items() if form != "batch"}


def _clean(model: ir.Model, stored: Mapping[str, Any], opset: int) -> None:
    """Take out of the file what tells of its making, put in what its user wants to know, and set its versions."""
    for attribute in ("doc_string", "producer_name", "producer_version", "domain"):
        setattr(model, attribute, None)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    passes.ClearMetadataAndDocStringPass()(model)
    model.graph.name = "model"
    model.producer_name, model.producer_version = "normswap", __version__
    model.ir_version = LOWEST_IR[opset]
    for key, value in sorted(stored.items()):
        model.metadata_props[f"normswap.{key}"] = json.dumps(value, separators=(",", ":"))
    if model.opset_imports[""] > opset:  # torch writes no older operator set than 18
        version_converter.convert_version(model, opset, fallback=True)
        for node in model.graph.all_nodes():
            node.attributes.pop("noop_with_empty_axes", None)  # which the converter leaves and 17 does not know


def _weights_name(path: Path) -> str:
    """Return what a file of weights beside ``path`` is to be called, as nothing there is: a pair comes in two steps."""
    names = chain([f"{path.name}.data"], (f"{path.name}.{number}.data" for number in count(1)))
    return next(name for name in names if not os.path.lexists(path.with_name(name)))


def _weights_of(path: Path) -> set[str]:
    """Return what the files of weights beside a file of ours are called; there are none beside others."""
    if not path.is_file():
        return set()
    try:
        tensors = onnx.load(path, load_external_data=False).graph.initializer
    except Exception:  # what protobuf raises of a file of another kind
        return set()
    found = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return {name for name in found if re.fullmatch(rf"{re.escape(path.name)}(\.\d+)?\.data", name)}


def _save(model: ir.Model, path: Path, name: str) -> None:
    """Write the file, and its weights beside it under ``name`` where they are too many for one."""
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if weights > ONE_FILE:
        ir.save(model, path, external_data=name)
    else:
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def _record(path: Path, verdict: Mapping[str, Any]) -> None:
    """Append the verdict to the file's metadata: to a serialized message, more of it may be added at its end."""
    entry = onnx.StringStringEntryProto(key="normswap.verdict", value=json.dumps(verdict, separators=(",", ":")))
    with path.open("ab") as file:
        file.write(onnx.ModelProto(metadata_props=[entry]).SerializeToString())


def _name_sites(traced: Traced, located: Mapping[str, ir.Value]) -> None:
    """Give each layer's output that is still there the layer's name, unless it is the model's output and has one."""
    graph = traced.model.graph
    values = {str(value.name): value for node in graph for value in node.outputs}
    taken = {*values, *traced.inputs, *traced.outputs, *graph.initializers}
    present = {site: value for site, value in located.items() if values.get(str(value.name)) is value}
    named: set[int] = set()  # two layers may return one value
    for site, value in present.items():
        if not value.is_graph_output() and value.name != site and id(value) not in named:
            value.name = unique(site, taken)
            taken.add(value.name)
        named.add(id(value))
    traced.sites = {site: str(value.name) for site, value in present.items()}


def _shapes(graph: ir.Graph) -> dict[str, list[int | str | None]]:
    """Return the shapes of a graph's inputs by name."""
    return {str(value.name): shape_of(value) for value in graph.inputs}


def _norm_report(
    traced: Traced, folds: Sequence[Fold], forms: Mapping[str, Form]
) -> tuple[dict[str, str], dict[str, str]]:
    by_value = {value: site for site, value in traced.sites.items()}
    folded, kept = {}, {}
    for fold in folds:
        site = by_value.get(fold.value, fold.value)
        if fold.into is not None:
            folded[site] = fold.into
        else:
            kept[site] = fold.reason
    return folded, kept | {name: f"its statistics are taken from each sample ({form})" for name, form in forms.items()}
