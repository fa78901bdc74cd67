"""A Keras model as an ONNX graph, and as a reference to hold that graph against."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import keras
import numpy as np
import onnx_ir as ir

from ...convert.gates import CLOSED_GATE
from ...errors import NormswapError, UnsupportedError, said
from ...frameworks.example import Inputs, not_taken
from ...frameworks.keras import (
    Interface,
    Specs,
    distinct_layers,
    inference,
    input_types,
    is_mixed,
    layer_name,
    named_layers,
    named_outputs,
    opened,
    recording,
    single_precision,
    weighted_layers,
)
from ...frameworks.names import unique
from ...layers.keras import SwitchNormalization
from ...patchers.keras.swap import MARK
from ..dimensions import Open, explained, label_of, wanted
from ..norms import STATISTICS
from ..traced import Traced
from .graph import add_biases, declare, mark, marks, merge_outputs, name_sites, probe, take_probe, tidy, write_gemms
from .layout import sink_transposes
from .norms import StandIns
from .sizes import fold_sizes

Array = np.ndarray[Any, Any]


class _Converter(Protocol):
    """What turns a function of a Keras backend into an ONNX model."""

    def convert(
        self,
        function: Callable[..., Sequence[Any]],
        model: Any,
        specs: Specs,
        open_sizes: Open,
        names: Callable[[], Sequence[str]],
        opset: int,
    ) -> tuple[ir.Model, list[tuple[int, int]]]:
        """Return ``function``, which calls ``model`` on one tensor per entry of ``specs``, as an ONNX model.

        Beside it, which of the ``open_sizes`` are fixed in it, at what ``specs`` say.
        """


def trace(model: Any, example: Inputs, *, opset: int, dynamic: bool = False) -> Traced:
    """Return ``model`` in inference mode as an ONNX graph of operator set ``opset``, nothing folded.

    The arrays of ``example`` have the batch first, which is left open unless the model fixes it; with ``dynamic`` every
    size that the model leaves open is open. `Traced.sites` name values as `record` returns them: what convolutions and
    per-channel norms compute is (N, C, ...) there. Where the graph has such a value channels last only, the site is a
    Transpose that nothing uses, which cleaning takes away.

    Raises `InputError` if the shapes do not fit the model, `UnsupportedError` if the model is not built, runs on
    JAX, takes text, has no open size for ``dynamic`` or uses an operation that ONNX lacks, and
    `MissingDependencyError`.
    """
    converter = _converter()
    inputs = Interface(model, example)
    if texts := [name for name, (_, dtype) in inputs.specs.items() if dtype == "string"]:
        raise UnsupportedError(_unreadable(texts))
    shapes = [shape for shape, _ in inputs.specs.values()]
    open_sizes = _open_sizes(model, inputs.names, shapes, dynamic=dynamic)
    stand_ins = StandIns(model)
    names: list[str] = []
    sites: list[str] = []

    def run(*tensors: Any) -> list[Any]:
        def within(tensor: Any) -> bool:  # not within the body of a loop, which TensorFlow makes a graph of its own
            return getattr(tensor, "graph", None) is getattr(tensors[0], "graph", None)

        with stand_ins.standing_in(within), recording(model) as returned:
            outputs = named_outputs(inputs.call(tensors), model, taken=inputs.names)
        own = {site: tensor for site, tensor in returned.items() if within(tensor)}
        names[:] = outputs
        sites[:] = own
        marked = [mark(tensor, number) for number, tensor in enumerate(own.values(), len(stand_ins.calls))]
        return [*outputs.values(), probe(marked)]

    with inference(model), single_precision(model):
        try:
            with stand_ins.looking():
                looked = named_outputs(inputs.call(inputs.tensors()), model, taken=inputs.names)
        except NormswapError:
            raise
        except Exception as error:
            raise not_taken(said(error)) from error

        def named() -> list[str]:
            return [*names, unique("probe", [*inputs.names, *names])]

        converted, fixed = converter.convert(run, model, inputs.specs, open_sizes, named, opset)
    open_sizes = {place: name for place, name in open_sizes.items() if place not in fixed}
    found = marks(converted.graph)
    norms = {found[number]: norm for number, norm in enumerate(stand_ins.calls) if number in found}
    told = [value.shape for value in converted.graph.outputs[:-1]]  # which the inference of shapes may lose
    write_gemms(converted)
    fold_sizes(converted.graph)
    sink_transposes(converted.graph, fixed=found.values())
    add_biases(converted.graph)
    merge_outputs(converted.graph)
    values = take_probe(converted.graph)
    numbered = enumerate(sites, len(stand_ins.calls))
    located = {site: values[number] for number, site in numbered if number in values}
    located = name_sites(located, taken=[*inputs.names, *names])
    tidy(converted.graph, keep=located.values())
    returned = [tuple(tensor.shape) for tensor in looked.values()]
    for value, shape, own in zip(converted.graph.outputs, told, returned, strict=True):
        value.shape = ir.Shape([None] * len(own)) if shape is None or len(shape) != len(own) else shape
    declare(converted.graph, shapes, open_sizes, returned)
    found_sites = {site: str(value.name) for site, value in located.items()}
    return Traced(converted, inputs.names, names, found_sites, norms, explained(inputs.names, shapes, fixed))


def refusal(model: Any) -> str | None:
    """Return why ``model`` cannot be exported, whatever it is called with, or None.

    A layer goes on from the last call or has a table of words, as no file does, or the model reads text, or computes in
    other numbers than float32; a mixed policy's weights are float32.
    """
    for path, layer in named_layers(model):
        for dtype in (layer.variable_dtype, layer.compute_dtype):
            if dtype in {"float64", "float16", "bfloat16"} and not is_mixed(layer):
                return (
                    f"expected float32 weights, received {dtype} in layer {path!r}: rebuild the model with the dtype "
                    "policy float32"
                )
        if isinstance(layer, keras.layers.RNN) and layer.stateful:
            return (
                f"expected layers that start anew with every call, as a file does, received {path} with "
                "stateful=True; build it with stateful=False"
            )
        if isinstance(layer, _LOOKUPS):
            return (
                f"expected layers that compute with numbers, received {path}, a {type(layer).__name__} with a table "
                "that no ONNX file has; look up before the model, and export one of the layers behind it"
            )
    kinds = enumerate(input_types(model) or [])
    texts = [layer_name(model.inputs[index]) for index, kind in kinds if kind == "string"]
    return _unreadable(texts) if texts else None


_LOOKUPS = (keras.layers.StringLookup, keras.layers.IntegerLookup, keras.layers.TextVectorization)


def _unreadable(texts: Sequence[str]) -> str:
    return f"expected inputs of numbers, received {', '.join(texts)} of text; export the model behind what reads it"


def notes(model: Any) -> list[str]:
    """Return what is to be known of a file made from ``model``."""
    policies = sorted({layer.dtype_policy.name for layer in distinct_layers(model) if is_mixed(layer)})
    return [f"the model's dtype policy is {name}: the file computes in float32" for name in policies]


def norm_facts(model: Any) -> dict[str, dict[str, Any]]:
    """Return kind, eps, groups and gates of each replaced layer, by name."""
    facts: dict[str, dict[str, Any]] = {}
    for path, layer in weighted_layers(model).items():
        if (kind := vars(layer).get(MARK)) is not None:
            facts[path] = {"kind": kind, "eps": layer.epsilon}
            if isinstance(layer, keras.layers.GroupNormalization):
                facts[path]["groups"] = layer.groups
            elif isinstance(layer, SwitchNormalization):
                for name, gates in zip(("mean_gates", "var_gates"), layer.gates(), strict=True):
                    values = keras.ops.convert_to_numpy(gates).tolist()
                    facts[path][name] = [round(float(gate), 6) for gate in values]
    return facts


@contextmanager
def prune(model: Any, threshold: float) -> Iterator[dict[str, list[str]]]:
    """Close every gate below ``threshold`` of the Switchable Normalizations while the context is open.

    The context is a dictionary of the gates closed, by layer. The others keep their shares of each other.
    """
    before: list[tuple[Any, Array]] = []
    dropped: dict[str, list[str]] = {}
    try:
        for path, layer in weighted_layers(model).items():
            if isinstance(layer, SwitchNormalization):
                logits = layer.mean_weight, layer.var_weight
                for kind, variable, gates in zip(("mean", "variance"), logits, layer.gates(), strict=True):
                    weight, values = (keras.ops.convert_to_numpy(tensor) for tensor in (variable, gates))
                    below = (values < threshold) & (values > 0)
                    if below.any():
                        before.append((variable, np.array(weight)))
                        closed = weight.max() + CLOSED_GATE * keras.ops.convert_to_numpy(layer.temperature)
                        variable.assign(np.where(below, closed, weight))
                        shut = (STATISTICS[index] for index in np.flatnonzero(below))
                        dropped.setdefault(path, []).extend(f"{kind} {statistic}" for statistic in shut)
        yield dropped
    finally:
        for variable, weight in before:
            variable.assign(weight)


def _open_sizes(model: Any, names: Sequence[str], shapes: Sequence[tuple[int, ...]], *, dynamic: bool) -> Open:
    """Return a name for each first size, with ``dynamic`` for each other size that the model leaves open, too."""
    sizes = dict(wanted(names, shapes))
    own = opened(model, [shape[1:] for shape in shapes]) if dynamic else []
    for index, shape in enumerate(own):
        for axis in (axis for axis, size in enumerate(shape, 1) if size is None):
            sizes[index, axis] = label_of(names[index], axis)
    return sizes


def _converter() -> _Converter:
    backend = keras.backend.backend()
    if backend == "tensorflow":
        from . import tf2onnx

        return tf2onnx
    if backend == "torch":
        from . import on_torch

        return on_torch
    raise UnsupportedError(
        f"expected the tensorflow or the torch backend, received backend={backend!r}; save the model as .keras "
        "and export it with KERAS_BACKEND=tensorflow"
    )
