"""A model to a folded, cleaned and proven ONNX file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from .. import __version__
from ..errors import InputError, UnsupportedError, VerificationError
from ..sources.files import staged
from ..sources.framework import framework_of
from .fold import Fold, fold_batch_norms
from .traced import Traced
from .verify import Verdict, verify

Array = NDArray[Any]

LOWEST_IR = {17: 8, 18: 8, 19: 9, 20: 9}
"""The lowest IR version that is legal for an opset: older runtimes refuse newer ones."""


@dataclass(frozen=True)
class ExportReport:
    """What was written: the file, each norm folded or kept (with the reason), node count, size, and the verdict."""

    output: Path
    folded: dict[str, str]
    kept: dict[str, str]
    nodes: int
    size: int
    verdict: Verdict | None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "output": str(self.output),
            "folded": self.folded,
            "kept": self.kept,
            "nodes": self.nodes,
            "bytes": self.size,
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
            "notes": self.notes,
        }


def to_onnx(
    model: Any,
    path: str | Path,
    *,
    example: Any = None,
    opset: int = 20,
    overwrite: bool = False,
    check: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write ``model`` in inference mode to an ONNX file, its norms folded or in constant form, and prove the file.

    ``example`` is an input as the model takes it: an array or tensor (N, ...), or a tuple of them; a Keras model
    that knows its input shapes needs none. The batch dimension of the file is free. ``metadata`` is stored in the
    file as JSON under ``normswap.NAME``. With ``check`` the file is verified before it gets its name.

    Raises `UnsupportedError` for a model, dtype or opset that cannot be exported, `VerificationError` if the file
    computes something else than the model, `OutputExistsError` if ``path`` exists. No file is left on an error.
    """
    path = Path(path)
    if opset not in LOWEST_IR:
        low, high = min(LOWEST_IR), max(LOWEST_IR)
        raise UnsupportedError(f"expected an opset from {low} to {high}, received opset={opset}")
    adapter = adapter_of(model)
    if problem := adapter.dtype_problem(model):
        raise UnsupportedError(f"expected float32 weights, received {problem}")
    with staged(path, overwrite=overwrite) as temporary:
        traced = adapter.trace(model, example_arrays(adapter, model, example), opset=opset)
        folds = _finish(traced, opset, model, adapter, metadata or {})
        temporary.write_bytes(ir.to_proto(traced.model).SerializeToString(deterministic=True))
        verdict = verify(model, temporary) if check else None
        if verdict is not None and not verdict:
            raise VerificationError(verdict.explain(str(path)))
        size = temporary.stat().st_size
    folded, kept = _norm_report(traced, folds, adapter.norm_facts(model))
    notes = ["the model was in training mode: exported in inference mode"] if _training(model) else []
    return ExportReport(path, folded, kept, sum(1 for _ in traced.model.graph), size, verdict, notes)


def adapter_of(model: Any) -> ModuleType:
    """Return the module of this folder that speaks the model's framework."""
    return import_module(f".{framework_of(model)}", __package__)


def example_arrays(adapter: ModuleType, model: Any, example: Any) -> list[Array]:
    """Return example inputs as NumPy arrays of at least two samples; zeros of the model's own shapes if none."""
    if example is None:
        shapes: Sequence[tuple[int, ...]] | None = adapter.input_shapes(model)
        if shapes is None or any(size is None for shape in shapes for size in shape):
            raise InputError(f"expected an example input (--input-shape) to export, received example={example}")
        return [np.zeros((2, *shape), np.float32) for shape in shapes]
    parts = example if isinstance(example, tuple | list) else (example,)
    return [np.ascontiguousarray(part.detach().cpu() if hasattr(part, "detach") else part) for part in parts]


def _finish(traced: Traced, opset: int, model: Any, adapter: ModuleType, metadata: Mapping[str, Any]) -> list[Fold]:
    """Simplify, fold, clean and label the graph in place; return what became of each BatchNormalization."""
    graph = traced.model.graph
    _simplify(traced.model)
    _name_sites(traced)
    folds = fold_batch_norms(traced.model)
    _simplify(traced.model)
    alive = {value.name for node in graph for value in node.outputs}
    traced.sites = {site: value for site, value in traced.sites.items() if value in alive}

    for attribute in ("doc_string", "producer_name", "producer_version", "domain"):
        setattr(traced.model, attribute, None)
    traced.model.metadata_props.clear()
    graph.metadata_props.clear()
    passes.ClearMetadataAndDocStringPass()(traced.model)
    graph.name = "model"
    traced.model.producer_name, traced.model.producer_version = "normswap", __version__
    traced.model.ir_version = LOWEST_IR[opset]
    facts = {
        "framework": framework_of(model),
        "norms": adapter.norm_facts(model),
        "sites": traced.sites,
        **metadata,
    }
    for key, value in sorted(facts.items()):
        traced.model.metadata_props[f"normswap.{key}"] = json.dumps(value, separators=(",", ":"))
    return folds


def _simplify(model: ir.Model) -> None:
    """Fold constants and drop what is dead: nothing that changes a BatchNormalization."""
    optimizer.fold_constants(model, onnx_shape_inference=True)
    for simplify in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
    ):
        simplify(model)


def _name_sites(traced: Traced) -> None:
    """Give each layer's output the layer's name, unless it is the model's output and has a name already."""
    values = {str(value.name): value for node in traced.model.graph for value in node.outputs}
    sites = {}
    for site, name in traced.sites.items():
        if name not in values:
            continue
        if not values[name].is_graph_output() and site not in values:
            values[name].name = site
        sites[site] = str(values[name].name)
    traced.sites = sites


def _norm_report(
    traced: Traced, folds: Sequence[Fold], facts: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, str], dict[str, str]]:
    by_value = {value: site for site, value in traced.sites.items()}
    folded, kept = {}, {}
    for fold in folds:
        site = by_value.get(fold.value, fold.value)
        if fold.into is not None:
            folded[site] = fold.into
        else:
            kept[site] = fold.reason
    for site in facts:
        if site not in folded and site not in kept and site in traced.sites:
            kept[site] = "its statistics are taken from each sample"
    return folded, kept


def _training(model: Any) -> bool:
    return framework_of(model) == "torch" and bool(model.training)
