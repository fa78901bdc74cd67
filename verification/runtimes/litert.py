"""LiteRT, which was TensorFlow Lite, as an adapter of `serve`; the files are those of its converter."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .serve import Value, serve


class Loaded:
    """A TFLite file with a signature, which has the names of its inputs and outputs."""

    precision = "f32"

    def __init__(self, path: Path, precision: str, outputs: list[str]) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.version = version("ai-edge-litert")
        interpreter = Interpreter(model_path=str(path), num_threads=1)
        signatures = list(interpreter.get_signature_list())
        if len(signatures) != 1:
            raise ValueError(f"it has {len(signatures)} signatures where one is expected")
        self.runner = interpreter.get_signature_runner(signatures[0])
        self.inputs: Sequence[Value] = [_value(name, told) for name, told in self.runner.get_input_details().items()]
        self.outputs: Sequence[Value] = [_value(name, told) for name, told in self.runner.get_output_details().items()]

    def run(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the outputs, in memory of their own."""
        return {name: np.array(array) for name, array in self.runner(**arrays).items()}


def _value(name: str, told: Mapping[str, Any]) -> Value:
    return name, np.dtype(told["dtype"]).name, [int(size) for size in told["shape_signature"]]


if __name__ == "__main__":
    serve(Loaded, "ai-edge-litert")
