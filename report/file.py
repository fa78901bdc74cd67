"""What a page shows of an ONNX file: what the file itself tells, the verdict on it, and what its norms became."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from markupsafe import Markup

from ..formats.fields import read
from ..verification.file import OnnxFile, Proved
from ..verification.latency import Latencies
from ..verification.verdict import Check, Verdict
from .bundle import gates_section, size_of
from .charts import bar
from .graph import Node, Written, drawing, written
from .page import Block, Cell, Details, Facts, Figure, Figures, Section, Table, Text, Tile


@dataclass(frozen=True)
class NormFacts:
    """What a file tells of a norm: its kind, and what that kind has."""

    kind: str
    eps: float
    groups: int | None = None
    mean_gates: list[float] | None = None
    var_gates: list[float] | None = None
    form: str | None = None


def norms_of(file: OnnxFile) -> dict[str, NormFacts]:
    """Return what a file tells of its norms; raises `InputError` if that is damaged."""
    return read(dict[str, NormFacts], file.metadata.get("norms", {}), file.told("norms"))


def sections_of(file: OnnxFile) -> tuple[list[Section], list[Tile], dict[str, Any]]:
    """Return what a file tells of itself: for the page, what is to be seen first, and as plain data.

    Raises `InputError` if what normswap stored in it is damaged.
    """
    graph, norms = file.proto.graph, norms_of(file)
    groups = written(graph, list(norms))
    sections = [Section("The file", _about(file))]
    if norms:
        sections.append(Section("What the norms became", _norms(norms, groups)))
    gates = {
        name: (np.array(facts.mean_gates), np.array(facts.var_gates))
        for name, facts in norms.items()
        if facts.mean_gates and facts.var_gates
    }
    if gates:
        sections.append(gates_section(gates))
    folded = sum(len(each.names) for each in groups if each.into)
    tiles = [Tile("nodes", str(len(graph.node))), Tile("size", size_of(_size(file)))]
    if norms:
        tiles.append(Tile("norms", str(len(norms)), f"{folded} folded"))
    told = {
        "nodes": len(graph.node),
        "bytes": _size(file),
        "norms": [
            {"names": list(each.names), "into": each.into or None, "nodes": [node.op for node in each.nodes]}
            for each in groups
        ],
    }
    return sections, tiles, told


def verdict_section(verdict: Verdict, against: str) -> Section:
    """Return the checks of a verdict, those that failed first, each with how much of its tolerance it takes."""
    columns = ["output", "result", "difference / scale", "share of the tolerance", "tolerance", "batch", "inputs",
               "optimisation", "provider", "own error", "error / own"]  # fmt: skip
    rows = [_check(check) for check in sorted(verdict.checks, key=lambda check: check.passed)]
    said = verdict.explain().splitlines() if not verdict else [*verdict.notes]
    blocks: list[Block] = [
        Text(
            f"The file computes what {against} computes, on {len(verdict.checks)} checks: the largest difference is "
            f"{verdict.max_rel:.1e} of the scale of its output."
            if verdict
            else f"The file does not compute what {against} computes."
        ),
        *(Text(line.strip()) for line in said),
        Table(
            "Every output of every run",
            columns,
            rows,
            frozenset({"difference / scale", "tolerance", "batch", "own error", "error / own"}),
        ),
    ]
    if verdict.coverage:
        reached = {name: f"{got} of {rows} rows reached" for name, (got, rows) in verdict.coverage.items()}
        blocks.append(Facts(dict(reached)))
    return Section("Verdict", blocks)


def stored_section(stored: Proved | None, file: str) -> Section:
    """Return what a file says of its own verdict, which is no proof."""
    way = f"normswap verify MODEL {file} proves it, and so does --against BUNDLE of this report."
    if stored is None:
        return Section("Verdict", [Text(f"The file does not tell that it was proved; {way}")])
    said = f"The file says that it {stored} when it was written. What a file says of itself is no proof: {way}"
    return Section("Verdict", [Text(said)])


def verdict_tile(verdict: Verdict) -> Tile:
    """Return what came of a proof."""
    passed = sum(check.passed for check in verdict.checks)
    return Tile(
        "verdict",
        "passed" if verdict else "failed",
        f"{passed} of {len(verdict.checks)} checks",
        "good" if verdict else "bad",
    )


def latency_section(found: Latencies) -> Section:
    """Return the time that files take, side by side."""
    slowest = {batch: max(times[batch][0] for times in found.values()) for batch in next(iter(found.values()), {})}
    rows: list[list[Cell]] = [
        [name, str(batch), bar(median / (slowest[batch] or 1.0), f"{median:.2f}"), f"{least:.2f}"]
        for name, times in found.items()
        for batch, (median, least) in times.items()
    ]
    columns = ["file", "batch", "median, ms", "least, ms"]
    note = "In onnxruntime on the CPU of the machine that made this page; the files took turns."
    return Section("Latency", [Table("Time of a run", columns, rows, frozenset({"batch", "least, ms"})), Text(note)])


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    """Return the shape of an input or output, with a name for each size that is open."""
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in value.type.tensor_type.shape.dim]


def _check(check: Check) -> list[Cell]:
    mark = Markup('<b class="{}">{}</b>').format(*(("good", "passed") if check.passed else ("bad", "failed")))
    share = check.max_rel / check.tolerance if check.finite else float("inf")
    return [
        check.output,
        mark,
        f"{check.max_rel:.1e}" if check.finite else "not finite",
        bar(share, f"{100 * share:.0f} %" if share < 10 else f"{share:.2g}x", "blue" if check.passed else "vermilion"),
        f"{check.tolerance:g}",
        str(check.batch),
        check.inputs,
        check.optimisation,
        check.provider,
        None if check.own is None else f"{check.own:.1e}",
        None if check.ratio is None else f"{check.ratio:.2g}",
    ]


def _about(file: OnnxFile) -> list[Block]:
    proto = file.proto
    opset = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in proto.opset_import)
    constants = sum(int(np.prod(tensor.dims, dtype=np.float64)) for tensor in proto.graph.initializer)
    framework = file.metadata.get("framework")
    facts = Facts(
        {
            "made by": " ".join(filter(None, [proto.producer_name, proto.producer_version])),
            "of a model of": {"torch": "PyTorch", "keras": "Keras"}.get(str(framework)),
            "operator set": opset,
            "IR version": str(proto.ir_version),
            "computes in": "float16" if file.half else "float32",
            "numbers in it": f"{constants:,}",
            "inputs": "; ".join(map(_value, file.inputs)),
            "outputs": "; ".join(map(_value, proto.graph.output)),
        }
    )
    counts = Counter(node.op_type for node in proto.graph.node).most_common()
    most = counts[0][1] if counts else 1
    rows: list[list[Cell]] = [[op, bar(count / most, str(count))] for op, count in counts]
    table = Table("How often each operator is there", ["operator", "nodes"], rows)
    return [facts, Details(f"{len(counts)} kinds of operators", [table])]


def _value(value: onnx.ValueInfoProto) -> str:
    return f"{value.name} ({', '.join(map(str, shape_of(value)))})"


def _size(file: OnnxFile) -> int:
    names = {entry.value for tensor in file.proto.graph.initializer for entry in tensor.external_data
             if entry.key == "location"}  # fmt: skip
    return len(file.content) + sum(int((file.path.parent / name).stat().st_size) for name in names)


_BATCH_NORM = (Node("BatchNormalization", "", ("x",)),)


def _norms(norms: Mapping[str, NormFacts], groups: list[Written]) -> list[Block]:
    blocks: list[Block] = [
        Text(
            "A BatchNorm is one operator of constant statistics, which goes into the layer before it where that is "
            "linear. What stands in its place now:"
        )
    ]
    for number, each in enumerate(groups):
        kind = norms[each.names[0]].kind
        count = f"{len(each.names)} layer{'' if len(each.names) == 1 else 's'} of {kind}"
        if each.into:
            text = f"no operator, folded into {each.into}"
            before: tuple[Node, ...] = (Node(each.into, "", ("x",)), Node("BatchNormalization", "", (0,)))
            after: tuple[Node, ...] = (Node(each.into, "with the norm in its weights", ("x",)),)
        else:
            text = f"{len(each.nodes)} operator{'' if len(each.nodes) == 1 else 's'}"
            before, after = _BATCH_NORM, each.nodes
        pictures = Figures(
            [
                Figure("Before: BatchNorm", drawing(f"BatchNorm of {each.names[0]}", before)),
                Figure(f"After: {kind}", drawing(f"{kind} of {each.names[0]}", after)),
            ]
        )
        layers = Text(f"Layers: {', '.join(each.names)}")
        blocks.append(Details(f"{count}: {text}", [layers, pictures], open=number == 0))
    found = {name for each in groups for name in each.names}
    missing = [name for name in norms if name not in found]
    if missing:
        blocks.append(Text(f"Not found by name in the graph: {', '.join(missing)}"))
    return blocks
