"""The other end of the protocol for runtimes of Python: load a file once, and answer what is asked of it."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Array = NDArray[Any]
Value = tuple[str, str, list[int]]
"""An input or output: its name, NumPy type, and shape with -1 where it is free."""


class Loaded(Protocol):
    """A file in a runtime. ``inputs`` and ``outputs`` are told of files that are not ONNX, empty for others."""

    version: str
    precision: str
    inputs: Sequence[Value]
    outputs: Sequence[Value]

    def run(self, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return the outputs by name."""


def serve(load: Callable[[Path, str, list[str]], Loaded], package: str) -> None:
    """Load the job's file by ``load`` (its path, the precision, the names of its outputs), then answer until the end.

    An import error is taken for ``package`` missing.
    """
    folder = Path(sys.argv[-1])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    try:
        loaded = load(Path(job["file"]), job["precision"], job["outputs"])
    except ImportError as error:
        _tell(folder / "loaded.json", {"missing": package, "reason": str(error)})
        return
    except Exception as error:
        _tell(folder / "loaded.json", {"refused": _said(error)})
        return
    facts = {name: getattr(loaded, name) for name in ("version", "precision", "inputs", "outputs")}
    _tell(folder / "loaded.json", facts)
    for number in map(str.strip, sys.stdin):
        try:
            found = loaded.run(load_file(folder / f"{number}.in"))
            save_file({name: np.array(array, order="C") for name, array in found.items()}, folder / f"{number}.out")
            answer = {}
        except Exception as error:
            answer = {"failed": _said(error)}
        _tell(folder / f"{number}.json", answer)


def _said(error: Exception) -> str:
    """Return an error in a line; in C++'s, what stands behind the place in its sources."""
    return " ".join(str(error).split()) or type(error).__name__


def _tell(path: Path, facts: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(facts), encoding="utf-8")
    part.rename(path)
