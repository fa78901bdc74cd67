"""A file in a runtime other than onnxruntime, as the proof sees it: the same batches, the same bounds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx

from ..errors import VerificationError, named, option
from .file import OnnxFile
from .reference import Arrays, Batch
from .runtimes.child import Child, RuntimeFailedError
from .runtimes.known import RUNTIMES
from .verdict import Ran, compare

_T = TypeVar("_T")


class Runs(Protocol):
    """A file in a runtime: what the proof asks of it.

    ``hows`` are the ways it is run, each on a provider and with optimisation off or on; ``ordered`` says whether the
    inputs and outputs have an order.
    """

    name: str
    ordered: bool
    file: OnnxFile
    outputs: list[str]
    notes: list[str]

    @property
    def hows(self) -> list[tuple[str, str]]: ...  # noqa: D102

    def outputs_of(self, how: tuple[str, str], batch: Batch) -> Arrays:
        """Return what the file computes on a batch; raises `InputError` of time alone, else what went wrong."""
        ...

    def layers(self, batch: Batch) -> Arrays:
        """Return what the file computes for each layer on a batch, as far as it can be asked."""
        ...

    def every_value(self, batch: Batch) -> Arrays:
        """Return every value in the graph, in order, as far as it can be asked."""
        ...

    def by_default(self, batches: Sequence[Batch]) -> Ran:
        """Return what the runtime is, and how far it is off at the precision that it takes by itself."""
        ...

    def ways_out(self) -> list[str]:
        """Return what may be done about a file that differs, as the runtime is known for it."""
        ...


class Elsewhere:
    """A file in a process of its own, which is ended with the ``with`` block.

    Of a file that is not ONNX, ``file`` is None: the runtime tells what it takes and returns.
    """

    def __init__(self, name: str, path: Path, file: OnnxFile | None, timeout: float) -> None:
        self.name, self.path, self.timeout = name, path, timeout
        self.runtime = RUNTIMES[name]
        self.notes: list[str] = []
        self.ordered = file is not None
        self._data = [] if file is None else file.beside
        self._outputs = [] if file is None else [value.name for value in file.proto.graph.output]
        self._child = self._loaded(path, self._outputs)
        self.file = file or _described(path, self._child.told)
        self.outputs = [value.name for value in self.file.proto.graph.output]

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close()

    @property
    def hows(self) -> list[tuple[str, str]]:
        """The one way it is run, which is how people do."""
        return [(self.runtime.device, "on")]

    def outputs_of(self, how: tuple[str, str], batch: Batch) -> Arrays:
        """Return what the file computes on a batch."""
        return self._child.run(feed(self.file, batch))

    def layers(self, batch: Batch) -> Arrays:
        """Return what the file computes for each layer on a batch; nothing of one that is not ONNX or in parts."""
        values = sorted(set(self.file.sites.values()))
        if not values or self._data:
            return {}
        with TemporaryDirectory(prefix="normswap-") as folder:
            path = Path(folder) / self.path.name
            path.write_bytes(self.file.with_outputs(values))
            names = [*self.outputs, *(value for value in values if value not in self.outputs)]
            try:
                with self._loaded(path, names) as child:
                    found = child.run(feed(self.file, batch))
            except Exception as error:
                self.notes.append(f"layers not compared in {self.name}: {error}")
                return {}
        return {site: found[value] for site, value in self.file.sites.items()}

    def every_value(self, batch: Batch) -> Arrays:
        """Return nothing: what is not finite is looked for in onnxruntime."""
        return {}

    def by_default(self, batches: Sequence[Batch]) -> Ran:
        """Return what the runtime is, and how far it is off at the precision that it takes by itself."""
        version, precision = self._child.told["version"], self._child.told["precision"]
        if not self.runtime.lowers:
            return Ran(self.name, version, precision, precision, None)
        try:
            with self._loaded(self.path, self._outputs, "default") as child:
                worst = 0.0
                for batch in batches:
                    found = child.run(feed(self.file, batch))
                    worst = max([worst, *(compare(found[name], batch.outputs[name])["max_rel"] for name in found)])
                return Ran(self.name, version, precision, child.told["precision"], worst)
        except Exception as error:
            self.notes.append(f"{self.name} fails at its default precision: {error}")
            return Ran(self.name, version, precision, "unknown", None)

    def ways_out(self) -> list[str]:
        """Return the form to write where the file has operators that the runtime is less exact with than others."""
        inexact = self.runtime.inexact
        if inexact not in {node.op_type for node in self.file.proto.graph.node}:
            return []
        return [f"{self.name} is less exact with {inexact} than others are: export with {option('runtime', self.name)}"]

    def _loaded(self, path: Path, outputs: Sequence[str], precision: str = "f32") -> Child:
        try:
            return Child(
                self.runtime, path, outputs=outputs, precision=precision, data=self._data, timeout=self.timeout
            )
        except RuntimeFailedError as error:
            failure = str(error).rstrip(".")
            raise VerificationError(
                f"expected {self.name} to load {path}, received a failure: {failure}; update {self.name}, or leave it "
                f"out of {named('runtime')}"
            ) from None


def feed(file: OnnxFile, batch: Batch) -> Arrays:
    """Return a batch's inputs in the file's own floating-point type."""
    half = {value.name for value in file.inputs if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    return {name: array.astype(np.float16) if name in half else array for name, array in batch.arrays.items()}


def in_order(items: Sequence[_T], names: Sequence[str], name_of: Callable[[_T], str] = str) -> list[_T]:
    """Return items in the order of their names among ``names``, and those that are not there behind."""
    return sorted(items, key=lambda item: names.index(name_of(item)) if name_of(item) in names else len(names))


def _described(path: Path, told: Mapping[str, Any]) -> OnnxFile:
    """Return what a runtime tells of a file as a graph without nodes: its inputs and outputs; sizes of -1 are free."""
    inputs, outputs = (
        [
            onnx.helper.make_tensor_value_info(
                name,
                onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)),
                [size if size >= 0 else f"{name}.{axis}" if axis else "batch" for axis, size in enumerate(shape)],
            )
            for name, dtype, shape in told[kind]
        ]
        for kind in ("inputs", "outputs")
    )
    return OnnxFile(path, b"", onnx.ModelProto(graph=onnx.GraphProto(input=inputs, output=outputs)))
