"""A reference as an .npz file, against which a file is verified where the framework is not installed."""

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import InputError, spoken
from ..formats.fields import read
from ..formats.place import Place
from ..formats.text import json_object
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
            place = Place(str(path), remedy=f"write it again with {wrote()}")
            index = json_object(str(arrays["index"]), place)
            if index.get("format") != FORMAT:
                raise ValueError(f"format={index.get('format')!r} where this version reads {FORMAT}")
            told = read(_Index, index, place)
            batches = [_batch(arrays, number, batch) for number, batch in enumerate(told.batches)]
            if not batches:
                raise ValueError("no batch in it")
            if len({(*b.arrays, "", *b.outputs) for b in batches}) != 1:
                raise ValueError("batches of different inputs or outputs")
            rows = {name: arrays[f"rows.{name}"] for name in told.coverage if f"rows.{name}" in arrays}
            return Reference(batches, notes=told.notes, coverage=told.coverage, rows=rows)
    except InputError:
        raise
    except KeyError as error:
        reason = f"no {str(error.args[0]).split()[0]} in it"
    except Exception as error:
        reason = str(error) or type(error).__name__
    raise InputError(f"expected a reference written by {wrote()} in {path}, received {reason}; write it again")


def wrote() -> str:
    """Return what writes a reference."""
    return spoken("--save-reference", "save_reference=")


@dataclass(frozen=True)
class _Batch:
    """What the index tells of a batch: the names of its arrays by kind, and what it is."""

    scale: float | None
    inputs: list[str]
    outputs: list[str]
    exact_outputs: list[str]
    layers: list[str] = field(default_factory=list)
    exact_layers: list[str] = field(default_factory=list)
    origin: str = "data"
    spare: bool | None = None
    errors: tuple[Errors, Errors] = ({}, {})


@dataclass(frozen=True)
class _Index:
    """What the index tells: see `Reference`."""

    format: Literal[1]
    notes: list[str]
    batches: list[_Batch]
    coverage: dict[str, tuple[int, int]] = field(default_factory=dict)


def _batch(stored: Any, number: int, told: _Batch) -> Batch:
    def arrays(kind: str) -> Arrays:
        names = getattr(told, kind)
        if len({*names}) < len(names):
            raise ValueError(f"a name twice in the {kind} of batch {number}")
        return {name: stored[f"{number}.{kind}.{index}"] for index, name in enumerate(names)}

    inputs, outputs = arrays("inputs"), arrays("outputs")
    if not inputs or not outputs:
        raise ValueError(f"batch {number} without inputs or outputs")
    exact = (arrays("exact_outputs"), arrays("exact_layers"))
    spare = told.scale not in (None, 1.0) if told.spare is None else told.spare
    return Batch(told.scale, inputs, outputs, arrays("layers"), exact, told.errors, told.origin, spare)
