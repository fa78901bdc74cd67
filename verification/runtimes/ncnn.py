"""ncnn on the CPU, as an adapter of `serve`; pnnx converts the ONNX file in the child's own folder.

ncnn has no batch: a file is run sample by sample.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from .serve import Value, serve

NARROW = ("use_fp16", "use_bf16", "use_int8")
"""How the options of ncnn begin that let it compute in less than float32."""


class Loaded:
    """An ONNX file that pnnx has converted, with open first sizes and no others."""

    inputs: Sequence[Value] = ()
    outputs: Sequence[Value] = ()

    def __init__(self, path: Path, precision: str, outputs: list[str]) -> None:
        import ncnn
        from pnnx import EXEC_PATH

        self.mat, self.names = ncnn.Mat, outputs
        self.version, self.precision = version("ncnn"), "f32" if precision == "f32" else "fp16"
        model, folder = onnx.load(path), Path(sys.argv[-1])
        _require_convertible(model.graph)
        self.taken = [value.name for value in model.graph.input]
        self.shapes = {value.name: _sizes(value)[1:] for value in model.graph.output}
        onnx.save(model, folder / "net.onnx")
        shapes = ",".join(str([1, *_sizes(value)[1:]]).replace(" ", "") + "f32" for value in model.graph.input)
        command = [EXEC_PATH, "net.onnx", f"inputshape={shapes}", *(["fp16=0"] if precision == "f32" else [])]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        param = folder / "net.ncnn.param"
        if said.returncode or not param.exists():
            raise ValueError(f"pnnx does not convert it: {(said.stderr.strip().splitlines() or ['no reason'])[-1]}")
        kinds = {line.split()[0] for line in param.read_text(encoding="utf-8").splitlines()[2:] if line.strip()}
        if lacking := sorted(kind for kind in kinds if not kind.isalnum()):
            raise ValueError(f"it lacks {', '.join(lacking)}")
        self.net = ncnn.Net()
        for option in dir(self.net.opt) if precision == "f32" else ():
            if option.startswith(NARROW):
                setattr(self.net.opt, option, False)
        self.net.opt.num_threads = 1
        if self.net.load_param(str(param)) or self.net.load_model(str(folder / "net.ncnn.bin")):
            raise ValueError("it does not load what pnnx has converted")

    def run(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the outputs of every sample, one behind the other."""
        samples = zip(*(arrays[name] for name in self.taken), strict=True)
        found = [self._one(sample) for sample in samples]
        return {name: np.stack(values) for name, values in zip(self.names, zip(*found, strict=True), strict=True)}

    def _one(self, sample: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        extractor, found = self.net.create_extractor(), []
        for index, array in enumerate(sample):
            extractor.input(f"in{index}", self.mat(np.ascontiguousarray(array)).clone())
        for index, name in enumerate(self.names):
            code, mat = extractor.extract(f"out{index}")
            if code:
                raise ValueError(f"it does not compute {name}")
            found.append(np.array(mat).reshape(self.shapes[name] or mat.numpy().shape))
        return found


def _require_convertible(graph: onnx.GraphProto) -> None:
    """Raise `ValueError` for what pnnx or ncnn get wrong without a word."""
    for node in graph.node:
        if node.op_type.startswith("Reduce") and len(node.input) > 1:
            raise ValueError(f"pnnx loses the axes of {node.op_type} from opset 18 on; export it with opset 17")
    for value in (*graph.input, *graph.output):
        sizes, kind = _sizes(value), value.type.tensor_type.elem_type
        if not kind and value not in graph.input:
            continue  # a layer's, of which nothing is declared
        if kind != onnx.TensorProto.FLOAT:
            raise ValueError(f"{value.name} is not of float32")
        if not sizes or sizes[0] not in (0, 1) or 0 in sizes[1:]:
            raise ValueError(f"{value.name} has other sizes than an open batch and fixed ones behind it")


def _sizes(value: onnx.ValueInfoProto) -> list[int]:
    """Return the sizes of a value, 0 for those that are open."""
    return [size.dim_value for size in value.type.tensor_type.shape.dim]


if __name__ == "__main__":
    serve(Loaded, "ncnn and pnnx")
