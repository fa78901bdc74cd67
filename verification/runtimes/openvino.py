"""OpenVINO on the CPU, as an adapter of `serve`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .serve import Value, serve


class Loaded:
    """An ONNX file that OpenVINO has compiled."""

    inputs: Sequence[Value] = ()
    outputs: Sequence[Value] = ()

    def __init__(self, path: Path, precision: str, outputs: list[str]) -> None:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # which tells of every import
        from openvino import Core, __version__

        self.names = outputs
        self.version = str(__version__).partition("-")[0]
        core = Core()
        settings = {"INFERENCE_PRECISION_HINT": "f32"} if precision == "f32" else {}
        self.compiled = core.compile_model(core.read_model(path), "CPU", settings)
        self.precision = self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()

    def run(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the outputs, which OpenVINO keeps in the file's order."""
        found = self.compiled(dict(arrays))
        return dict(zip(self.names, (found[index] for index in range(len(self.names))), strict=True))


if __name__ == "__main__":
    serve(Loaded, "openvino")
