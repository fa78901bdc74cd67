"""onnxruntime on an NVIDIA card, by CUDA or TensorRT, as adapters of `serve`.

Its default precision there is TF32, which has ten bits where float32 has 23. (Not run here: there is no such card.)
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from ...errors import MissingDependencyError
from ..runtime import session
from .serve import Value, serve


class Loaded:
    """An ONNX file in a session of one provider."""

    inputs: Sequence[Value] = ()
    outputs: Sequence[Value] = ()

    def __init__(self, path: Path, precision: str, outputs: list[str]) -> None:
        provider = sys.argv[1]
        self.names = outputs
        self.version, self.precision = onnxruntime.__version__, "f32" if precision == "f32" else "tf32"
        if precision == "f32":
            os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
        try:
            self.session = session(path, provider=provider, settings=None if precision == "f32" else {})
        except MissingDependencyError as error:
            raise ImportError(str(error)) from None

    def run(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the outputs."""
        return dict(zip(self.names, self.session.run(self.names, dict(arrays)), strict=True))


if __name__ == "__main__":
    serve(Loaded, "onnxruntime-gpu")
