"""A reference as an .npz file, against which a file is verified where the framework is not installed."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, spoken
from ..sources.files import require_file
from ..sources.outputs import staged
from .reference import FEW, Arrays, Batch, Errors, Reference

FORMAT = 1


def save_reference(reference: Reference, path: Path, *, overwrite: bool = False) -> None:
    """Write a reference with its float64 outputs; the layers' outputs are kept of the first batch alone.

    The same reference gives the same bytes. Raises `OutputExistsError` if ``path`` exists.
    """
    stored: Arrays = {}
    batches = []
    for number, batch in enumerate(reference.batches):
        outputs, layers = reference.exact(batch)
        kinds = {"inputs": batch.arrays, "outputs": batch.outputs, "exact_outputs": outputs}
        if number == 0:
            kinds |= {"layers": batch.layers, "exact_layers": layers}
        told: dict[str, Any] = {"scale": batch.scale, "origin": batch.origin, "spare": batch.spare}
        if any(array.size < FEW for array in batch.outputs.values()):
            told["errors"] = reference.errors(batch)
        for kind, arrays in kinds.items():
            told[kind] = list(arrays)
            stored |= {f"{number}.{kind}.{index}": array for index, array in enumerate(arrays.values())}
        batches.append(told)
    index = json.dumps({"format": FORMAT, "notes": reference.notes, "coverage": reference.coverage, "batches": batches})
    stored |= {f"rows.{name}": rows for name, rows in reference.rows.items()}
    with staged(path, overwrite=overwrite) as temporary, temporary.open("wb") as file:
        np.savez(file, **{"index": np.array(index), **stored})  # type: ignore[arg-type]


def load_reference(path: Path) -> Reference:
    """Return the reference in a file; raises `InputError` if it holds none or is damaged. Nothing in it is run."""
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its arrays are compressed")
        with np.load(path, allow_pickle=False) as arrays:
            index = json.loads(str(arrays["index"]))
            if index["format"] != FORMAT:
                raise ValueError(f"format={index['format']} where this version reads {FORMAT}")
            batches = [_batch(arrays, number, told) for number, told in enumerate(index["batches"])]
            if not batches:
                raise ValueError("no batch in it")
            if len({(*b.arrays, "", *b.outputs) for b in batches}) != 1:
                raise ValueError("batches of different inputs or outputs")
            coverage = {str(name): (int(a), int(b)) for name, (a, b) in index.get("coverage", {}).items()}
            notes = [str(note) for note in index["notes"]]
            rows = {name: arrays[f"rows.{name}"] for name in coverage if f"rows.{name}" in arrays}
            return Reference(batches, notes=notes, coverage=coverage, rows=rows)
    except KeyError as error:
        reason = f"no {str(error.args[0]).split()[0]} in it"
    except Exception as error:
        reason = str(error) or type(error).__name__
    wrote = spoken("--save-reference", "save_reference=")
    raise InputError(f"expected a reference written by {wrote} in {path}, received {reason}")


def _batch(stored: Any, number: int, told: dict[str, Any]) -> Batch:
    def read(kind: str) -> Arrays:
        return {name: stored[f"{number}.{kind}.{index}"] for index, name in enumerate(told.get(kind, ()))}

    inputs, outputs = read("inputs"), read("outputs")
    if not inputs or not outputs:
        raise ValueError(f"batch {number} without inputs or outputs")
    scale = told["scale"]
    exact = (read("exact_outputs"), read("exact_layers"))
    scale = None if scale is None else float(scale)
    spare = bool(told.get("spare", scale not in (None, 1.0)))
    errors: list[Errors] = [{str(k): float(v) for k, v in each.items()} for each in told.get("errors", ({}, {}))]
    origin = str(told.get("origin", "data"))
    return Batch(scale, inputs, outputs, read("layers"), exact, (errors[0], errors[1]), origin, spare)
