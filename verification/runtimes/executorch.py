"""ExecuTorch on the CPU, by XNNPACK and its portable kernels, as an adapter of `serve`; the files are `export`'s."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .serve import Value, serve

TOLD = "normswap"
"""The method of a file that tells what its inputs and outputs are, of which ExecuTorch keeps no names."""


class Loaded:
    """A file of ExecuTorch with a method `TOLD`, which returns ``inputs``, ``outputs`` and ``most`` samples as JSON."""

    precision = "f32"

    def __init__(self, path: Path, precision: str, outputs: list[str]) -> None:
        from executorch.runtime import Runtime

        self.version = version("executorch")
        program = Runtime.get().load_program(path)
        if TOLD not in program.method_names:
            raise ValueError("it does not tell the names of its inputs and outputs, as a file of normswap export does")
        told = json.loads(program.load_method(TOLD).execute([])[0])
        self.inputs: Sequence[Value] = told["inputs"]
        self.outputs: Sequence[Value] = told["outputs"]
        self.most = told["most"]
        self.method = program.load_method("forward")

    def run(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the outputs."""
        import torch

        for name, _, shape in self.inputs:
            if shape and shape[0] == -1 and len(arrays[name]) > self.most:
                raise ValueError(f"it takes at most {self.most} samples at once")
        found = self.method.execute([torch.from_numpy(arrays[name]) for name, _, _ in self.inputs])
        return {name: tensor.numpy() for (name, _, _), tensor in zip(self.outputs, found, strict=True)}


if __name__ == "__main__":
    serve(Loaded, "executorch")
