"""Read an ONNX file that may come from anywhere: nothing it says is believed before it is checked.

The order matters: versions and operators are told from the graph alone, external data is located, contained and
measured before a byte of it is read, and only then may the checker and onnxruntime look.
"""

import math
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
import onnxruntime
from onnx import TensorProto

from ..errors import InputError, UnsupportedError
from ..formats.fields import read
from ..formats.place import Place
from ..formats.text import from_json
from ..sources.files import is_text, require_file

PREFIX = "normswap."
_PACKED = {"FLOAT4E2M1": 4, "INT2": 2, "INT4": 4, "UINT2": 2, "UINT4": 4, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}
_TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


@dataclass(frozen=True)
class Proved:
    """What a file says of the verdict on it, from when it was written: no proof."""

    passed: bool
    checks: int
    tolerance: float

    def __str__(self) -> str:
        outcome = "passed" if self.passed else "did not pass"
        return f"{outcome} {self.checks} checks at a tolerance of {self.tolerance:g}"


@dataclass(frozen=True)
class OnnxFile:
    """A checked file: its bytes as they were read, and the model in them; external data is left where it lies."""

    path: Path
    content: bytes
    proto: onnx.ModelProto

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """The graph inputs that a caller has to give."""
        constants = {tensor.name for tensor in self.proto.graph.initializer}
        return [value for value in self.proto.graph.input if value.name not in constants]

    @property
    def metadata(self) -> dict[str, Any]:
        """What normswap stored in the file, by name; raises `InputError` if it is not JSON."""
        entries = {entry.key: entry.value for entry in self.proto.metadata_props if entry.key.startswith(PREFIX)}
        names = {key: key.removeprefix(PREFIX) for key in entries}
        return {names[key]: from_json(text, self.told(names[key])) for key, text in entries.items()}

    def told(self, *way: str) -> Place:
        """Return the place of what normswap stored in the file, for messages."""
        return Place(f"the metadata of {self.path}", remedy="export the model again").of(*way)

    @property
    def sites(self) -> dict[str, str]:
        """The layers the file tells of, each with the value in the graph that it returns."""
        told = read(dict[str, Any], self.metadata.get("sites", {}), self.told("sites"))
        produced = {name for node in self.proto.graph.node for name in node.output}
        return {site: value for site, value in told.items() if isinstance(value, str) and value in produced}

    @property
    def proved(self) -> Proved | None:
        """What the file says of its verdict, None where it says nothing; raises `InputError` if that is damaged."""
        told = self.metadata.get("verdict")
        return None if told is None else read(Proved, told, self.told("verdict"))

    @property
    def half(self) -> bool:
        """Whether the file computes in float16: an input or a weight is."""
        types = [value.type.tensor_type.elem_type for value in self.proto.graph.input]
        return TensorProto.FLOAT16 in [*types, *(tensor.data_type for tensor in self.proto.graph.initializer)]

    @property
    def int8(self) -> bool:
        """Whether the file is what normswap made of a float file in int8."""
        return any(entry.key == f"{PREFIX}int8" for entry in self.proto.metadata_props)

    @property
    def pruned(self) -> float:
        """Below which an SN's gates were left out of the file; raises `InputError` if that is damaged."""
        return read(float, self.metadata.get("prune_gates", 0.0), self.told("prune_gates"))

    def instead(self, proto: onnx.ModelProto) -> "OnnxFile":
        """Return another model, made of this one, in its place."""
        return OnnxFile(self.path, proto.SerializeToString(), proto)

    @property
    def beside(self) -> list[str]:
        """The names of the files beside it that hold external data."""
        entries = (entry for tensor in _tensors(self.proto) for entry in tensor.external_data)
        return sorted({entry.value for entry in entries if entry.key == "location"})

    def with_outputs(self, names: Iterable[str]) -> bytes:
        """Return the model with further values as outputs: serialized messages are merged by joining their bytes."""
        own = {value.name for value in self.proto.graph.output}
        more = onnx.GraphProto(output=[onnx.ValueInfoProto(name=name) for name in names if name not in own])
        return self.content + bytes(onnx.ModelProto(graph=more).SerializeToString())


def read_model(path: Path) -> OnnxFile:
    """Return the model in an ONNX file after every check.

    Raises `InputError` if the file is damaged, if its external data is not wholly in plain files of the model's own
    folder, or if a tensor's shape is not that of its data; `UnsupportedError` for an IR version, operator set or
    operator that onnxruntime does not have.
    """
    require_file(path)
    content = path.read_bytes()
    try:
        proto = onnx.ModelProto.FromString(content)
    except Exception:
        raise _invalid(path, "it is damaged or cut short", "get the file once more") from None
    if not _is_text(proto):
        raise _invalid(path, "it holds a name that is no UTF-8", "get the file once more")
    if not proto.graph.output:
        raise _invalid(path, "it holds no graph with outputs")
    _require_versions(proto, path)
    _require_operators(proto, path)
    for tensor in _tensors(proto):
        _require_data(tensor, path)
    try:
        onnx.checker.check_model(str(path) if is_text(path) else content, full_check=True)
    except Exception as error:
        raise _invalid(path, str(error)) from None
    return OnnxFile(path, content, proto)


_NEWER = "update onnxruntime, or export the model again"


def _invalid(path: Path, reason: str, way: str = "export the model again") -> InputError:
    first = (reason.strip().splitlines() or ["no reason given"])[0].rstrip(".")
    return InputError(f"expected an ONNX model in {path}, received a file that is not valid: {first}; {way}")


def _is_text(message: Any) -> bool:
    """Return whether all names in a message are text: where one is not, protobuf gives its bytes."""
    for field, value in message.ListFields():
        if field.type in (field.TYPE_STRING, field.TYPE_MESSAGE) and field.name != "doc_string":
            for each in [value] if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value:
                if isinstance(each, bytes) or not (isinstance(each, str) or _is_text(each)):
                    return False
    return True


def _require_versions(proto: onnx.ModelProto, path: Path) -> None:
    newest_ir, newest_opset = newest_versions()
    if not 1 <= proto.ir_version <= newest_ir:
        raise UnsupportedError(
            f"expected an IR version from 1 to {newest_ir} in {path}, received ir_version={proto.ir_version}; {_NEWER}"
        )
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and not 1 <= entry.version <= newest_opset:
            raise UnsupportedError(
                f"expected an opset from 1 to {newest_opset} in {path}, received opset={entry.version}; {_NEWER}"
            )


@cache
def newest_versions() -> tuple[int, int]:
    """Return the newest IR version and operator set that the installed onnxruntime loads."""
    opset = next(o for o in range(onnx.defs.onnx_opset_version(), 0, -1) if _loads(8, o))
    return next(ir for ir in range(onnx.IR_VERSION, 0, -1) if _loads(ir, opset)), opset


def _loads(ir_version: int, opset: int) -> bool:
    values = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    imports = [onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True


def _require_operators(proto: onnx.ModelProto, path: Path) -> None:
    known = _operators() | {(function.domain, function.name) for function in proto.functions}
    for graph in _graphs(proto):
        for node in graph.node:
            domain = "" if node.domain == "ai.onnx" else node.domain
            if (domain, node.op_type) not in known:
                raise UnsupportedError(
                    f"expected operators that onnxruntime has in {path}, received {node.op_type} of domain "
                    f"{domain or 'ai.onnx'} (node {node.name or ', '.join(node.output)}); {_NEWER}"
                )


@cache
def _operators() -> frozenset[tuple[str, str]]:
    """Return the operators onnxruntime has; those of ONNX alone if its build does not tell."""
    state = onnxruntime.capi.onnxruntime_pybind11_state
    schemas = getattr(state, "get_all_operator_schema", onnx.defs.get_all_schemas)()
    return frozenset((schema.domain, schema.name) for schema in schemas)


def _graphs(proto: onnx.ModelProto) -> Iterator[Any]:
    """Yield the graph, the functions, and every graph in an attribute of their nodes."""
    waiting: list[Any] = [proto.graph, *proto.functions]
    while waiting:
        graph = waiting.pop(0)
        yield graph
        for attribute in (a for node in graph.node for a in node.attribute):
            waiting += [attribute.g, *attribute.graphs] if attribute.HasField("g") else list(attribute.graphs)


def _tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """Yield every tensor the file stores, wherever in it."""
    for graph in _graphs(proto):
        sparse = list(getattr(graph, "sparse_initializer", ()))
        yield from getattr(graph, "initializer", ())
        for attribute in (a for node in graph.node for a in node.attribute):
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            sparse += [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
            sparse += attribute.sparse_tensors
        for tensor in sparse:
            yield from (tensor.values, tensor.indices)


def _require_data(tensor: TensorProto, path: Path) -> None:
    """Raise `InputError` unless the tensor's data is there and is as much as its type and shape say."""
    what, way = f"tensor {tensor.name!r} of shape {tuple(tensor.dims)}", "get the file once more"
    if any(size < 0 for size in tensor.dims):
        raise InputError(f"expected sizes of 0 and more in {path}, received {what}; {way}")
    count = math.prod(tensor.dims)
    if tensor.data_type not in TensorProto.DataType.values() or tensor.data_type == TensorProto.UNDEFINED:
        raise InputError(
            f"expected a data type ONNX has in {path}, received {what} and data_type={tensor.data_type}; {way}"
        )
    kind = TensorProto.DataType.Name(tensor.data_type)
    if kind == "STRING" or (kind in _PACKED and not tensor.HasField("raw_data") and not tensor.external_data):
        return
    bits = _PACKED.get(kind) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    needed = math.ceil(count * bits / 8) if kind in _PACKED else count * bits // 8
    if tensor.data_location == TensorProto.EXTERNAL:
        _require_external(tensor, path, needed)
        return
    if tensor.HasField("raw_data"):
        stored = len(tensor.raw_data)
    else:
        parts = 2 if kind.startswith("COMPLEX") else 1
        stored = sum(len(getattr(tensor, field)) for field in _TYPED) * bits // 8 // parts
    if stored != needed:
        raise InputError(f"expected {needed} bytes in {path} for {what}, received {stored}; {way}")


def _require_external(tensor: TensorProto, path: Path, needed: int) -> None:
    """Raise `InputError` unless the tensor's external data is ``needed`` bytes of a plain file in the model's folder.

    Decided on names and sizes alone: no byte is read.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    where = f"location={location!r} for tensor {tensor.name!r}"
    refused = f"expected external data in plain files beside {path}, received {where}:"
    again, copy = "export the model again", "copy it"
    if not location or "\0" in location:
        raise InputError(f"{refused} no file's name; {again}")
    for flavour in (PurePosixPath(location), PureWindowsPath(location)):
        if flavour.is_absolute() or flavour.drive or flavour.root:
            raise InputError(f"{refused} an absolute path; {again}")
        if ".." in flavour.parts:
            raise InputError(f"{refused} it leaves the folder; {again}")
    file = path.parent
    for part in PurePosixPath(location).parts:
        file /= part
        if file.is_symlink():
            raise InputError(f"{refused} {file} is a symbolic link; {copy}")
    try:
        found = os.lstat(file)
    except (OSError, ValueError):
        raise InputError(f"{refused} there is no such file; get both files once more") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{refused} it is not a file; {again}")
    if found.st_nlink > 1:
        raise InputError(f"{refused} the file has {found.st_nlink} names (hard links); {copy}")
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or needed)
    except ValueError:
        raise InputError(
            f"expected an offset and a length in numbers for tensor {tensor.name!r} of {path}, received {entries}; "
            f"{again}"
        ) from None
    if offset < 0 or length != needed or offset + length > found.st_size:
        raise InputError(
            f"expected {needed} bytes within the {found.st_size} of {location} for tensor {tensor.name!r} of {path}, "
            f"received offset={offset} and length={length}; get both files once more"
        )
