"""The runtimes there are: how each is started, what it reads, and how it is installed."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError, MissingDependencyError

ONNXRUNTIME = "onnxruntime"
"""The one that runs in this process, on execution providers, without optimisation and with it."""


@dataclass(frozen=True)
class Runtime:
    """A runtime: the ``command`` that keeps to the protocol, and what to type where it is missing.

    ``lowers`` says whether it may compute in less than float32 where no precision is set, ``inexact`` what operator it
    rounds more in than others do, which `normswap.to_onnx` leaves out of files for it.
    """

    name: str
    command: tuple[str, ...]
    install: str
    reads: str = "ONNX"
    device: str = "cpu"
    lowers: bool = False
    inexact: str = ""

    def missing(self, package: str, reason: str) -> MissingDependencyError:
        """Return the error that says that a package of this runtime is not there."""
        return MissingDependencyError(
            f"expected {package} for runtime={self.name!r}, received none ({reason}): {self.install}"
        )


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"{__package__}.{module}", *arguments)


RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime("openvino", _python("openvino"), "pip install openvino", lowers=True),
        Runtime(
            "web",
            ("node", str(Path(__file__).with_name("web.cjs"))),
            "npm install onnxruntime-web",
            inexact="InstanceNormalization",
        ),
        Runtime("litert", _python("litert"), "pip install ai-edge-litert", reads="TFLite"),
        Runtime("executorch", _python("executorch"), "pip install executorch", reads="ExecuTorch"),
        Runtime("ncnn", _python("ncnn"), "pip install ncnn pnnx", lowers=True),
        Runtime("cuda", _python("providers", "cuda"), "pip install onnxruntime-gpu", device="cuda", lowers=True),
        Runtime(
            "tensorrt",
            _python("providers", "tensorrt"),
            "pip install onnxruntime-gpu tensorrt",
            device="cuda",
            lowers=True,
        ),
    )
}
"""All but onnxruntime's own, by name."""


def chosen_runtimes(names: Iterable[str], path: Path) -> list[str]:
    """Return the names of runtimes to prove a file in, each once.

    Raises `InputError` for a name that is none, if there is none, and for a runtime that reads no such file.
    """
    chosen = list(dict.fromkeys(names))
    known = [ONNXRUNTIME, *RUNTIMES]
    if other := [name for name in chosen if name not in known] or ([] if chosen else ["none"]):
        received = f"runtime={other[0]!r}" if chosen else "none"
        raise InputError(f"expected a runtime of {', '.join(known)}, received {received}")
    kind = kind_of(path)
    for name in chosen:
        reads = RUNTIMES[name].reads if name in RUNTIMES else "ONNX"
        if reads != kind:
            raise InputError(f"expected {_article(reads)} {reads} file for {name}, received {path}, {_kinds(kind)}")
    return chosen


def kind_of(path: Path) -> str:
    """Return which kind of file begins as this one: "TFLite" or "ExecuTorch", which say so, or else "ONNX"."""
    with path.open("rb") as file:
        said = file.read(8)[4:]
    if said == b"TFL3":
        return "TFLite"
    return "ExecuTorch" if said[:2] == b"ET" and said[2:].isdigit() else "ONNX"


def _article(kind: str) -> str:
    return "an" if kind[0] in "AEIOU" else "a"


def _kinds(kind: str) -> str:
    readers = [name for name, runtime in RUNTIMES.items() if runtime.reads == kind]
    return f"which is for {', '.join([*([ONNXRUNTIME] if kind == 'ONNX' else []), *readers])}"
