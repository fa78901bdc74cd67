"""Freeze a TensorFlow function and convert it to ONNX with tf2onnx.

The convenience routes of tf2onnx and Keras all fail on some model (a Sequential one, one with a Normalization
layer, one with a constant among its attributes). What works for all is to freeze the inference function, variables
and captured constants alike, and to convert the frozen graph.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import onnx
import onnx_ir as ir

from ...errors import MissingDependencyError, UnsupportedError, said
from ...frameworks.keras import Specs, named_layers
from ..dimensions import Open
from ..failures import place_of

_CONVERTER_OPSET = 18  # the newest that tf2onnx writes


def convert(
    function: Callable[..., Sequence[Any]],
    model: Any,
    specs: Specs,
    open_sizes: Open,
    names: Callable[[], Sequence[str]],
    opset: int,
) -> tuple[ir.Model, list[tuple[int, int]]]:
    """Return ``function``, which calls ``model`` on one tensor per entry of ``specs``, as an ONNX model.

    Beside it, which of the ``open_sizes`` are fixed: first sizes, if the model can be traced so only. The inputs are
    named as in ``specs``; ``names`` is asked for the outputs' names once the function is traced.
    Raises `UnsupportedError` where TensorFlow cannot trace the function and for an operation that ONNX lacks, and
    `MissingDependencyError`.
    """
    tf, freeze = _tensorflow()
    frozen_function = with_constants(tf, function, model)
    layers = {id(layer): path for path, layer in named_layers(model) if layer is not model}

    def traced(open_: Open) -> Any:
        signature = [
            tf.TensorSpec([None if (index, axis) in open_ else size for axis, size in enumerate(shape)], dtype)
            for index, (shape, dtype) in enumerate(specs.values())
        ]
        return tf.function(frozen_function, autograph=False).get_concrete_function(*signature)

    fixed = _steps(model, open_sizes)
    open_sizes = {place: name for place, name in open_sizes.items() if place not in fixed}
    with quiet(), inlined(tf):
        try:
            frozen = traced(open_sizes)
        except UnsupportedError:
            raise
        except Exception as error:
            try:
                fixed += [(index, axis) for index, axis in open_sizes if axis == 0]
                frozen = traced({place: name for place, name in open_sizes.items() if place not in fixed})
            except Exception:
                reason = said(error).partition(". ")[0].rstrip(".")
                raise UnsupportedError(
                    f"expected a model that TensorFlow can trace with inputs of {_described(specs, open_sizes)}, "
                    f"received {type(error).__name__}: {reason}"
                    f"{place_of(error, layers, [tf, keras])}; give every dimension that the model needs"
                ) from error
        if frozen.captured_inputs or frozen.graph.as_graph_def().library.function:
            frozen = freeze(frozen, lower_control_flow=False, aggressive_inlining=True)
        proto = _convert_frozen(tf, frozen, [*specs], [*names()], min(opset, _CONVERTER_OPSET))
    _require_onnx_operators(proto)
    converted = ir.from_proto(proto)
    for value, tensor in zip(converted.graph.outputs, frozen.outputs, strict=True):
        value.shape = None if tensor.shape.rank is None else ir.Shape(tensor.shape.as_list())
    for value in [value for value in converted.graph.inputs if value.is_initializer()]:  # one with a default
        converted.graph.inputs.remove(value)
    used = {node.domain for node in converted.graph.all_nodes()}
    for domain in set(converted.opset_imports) - used - {""}:
        del converted.opset_imports[domain]
    _raise_opset(converted, opset)
    return converted, fixed


def with_constants(tf: Any, function: Callable[..., Any], model: Any) -> Callable[..., Any]:
    """Return ``function``, which calls ``model``, with constants in the place of the model's variables."""
    weights = {id(v): (v, keras.ops.convert_to_numpy(v)) for v in model.variables}.values()

    def frozen_function(*tensors: Any) -> Any:
        with keras.StatelessScope([(v, tf.constant(value, name=v.path.replace("/", "."))) for v, value in weights]):
            return function(*tensors)

    return frozen_function


def _convert_frozen(tf: Any, frozen: Any, inputs: Sequence[str], outputs: Sequence[str], opset: int) -> onnx.ModelProto:
    """Return the frozen function as ONNX, its inputs and outputs renamed.

    These are the steps of tf2onnx's ``from_graph_def`` but for two: that copies the whole graph, weights and all,
    before each of some twenty passes, to carry on without those that fail, and once more into protobuf after each.
    """
    from tf2onnx import optimizer, tf_loader, tfonnx

    sources = [tensor.name for tensor in frozen.inputs]
    results = [tensor.name for tensor in frozen.outputs]
    with tf.device("/cpu:0"):
        definition = frozen.graph.as_graph_def(add_shapes=True)
        with tf.Graph().as_default():
            definition = tf_loader.tf_optimize(sources, results, definition)
        with tf.Graph().as_default() as plain:
            tf.import_graph_def(definition, name="")
            graph = tfonnx.process_tf_graph(
                plain,
                continue_on_error=True,
                opset=opset,
                input_names=sources,
                output_names=results,
                tensors_to_rename=dict(zip([*sources, *results], [*inputs, *outputs], strict=True)),
                custom_op_handlers={"Erfc": (_write_erfc, [])},
            )
            graph.update_proto = lambda: None  # which make_model does itself
            graph = optimizer.optimize_graph(graph, catch_errors=False)
            del graph.update_proto
    proto: onnx.ModelProto = graph.make_model("model")
    return proto


def _write_erfc(graph: Any, node: Any, name: str, _: list[Any]) -> None:
    """Write erfc, which TensorFlow's gelu is made of and ONNX lacks, as 1 - erf."""
    dtype = graph.get_dtype(node.output[0])
    one = graph.make_const(f"{name}_one", np.ones((), onnx.helper.tensor_dtype_to_np_dtype(dtype)))
    erf = graph.make_node("Erf", list(node.input), dtypes=[dtype])
    graph.remove_node(name)
    graph.make_node("Sub", [one.output[0], erf.output[0]], name=name, outputs=node.output)


def _raise_opset(model: ir.Model, opset: int) -> None:
    if opset > model.opset_imports[""]:
        from onnxscript import version_converter

        version_converter.convert_version(model, opset, fallback=False)
    if model.opset_imports[""] != opset:
        raise UnsupportedError(
            f"expected an operator set that tf2onnx and onnxscript can write, received opset={opset}; "
            "choose one from 17 to 20"
        )
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)], True)


def _require_onnx_operators(proto: onnx.ModelProto) -> None:
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    known = onnx.defs.has
    unknown = {n.op_type for n in _nodes(proto.graph) if not known(n.op_type, versions.get(n.domain, 1), n.domain)}
    if unknown:
        raise UnsupportedError(
            f"expected operations that tf2onnx can write in ONNX, received {', '.join(sorted(unknown))}; "
            "express them through other keras.ops"
        )


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _steps(model: Any, open_sizes: Open) -> list[tuple[int, int]]:
    """Return the open numbers of steps of a model that works step by step.

    TensorFlow makes one operation of all steps where their number is open, which tf2onnx writes wrongly.
    """
    stepwise = any(isinstance(layer, keras.layers.TimeDistributed) for _, layer in named_layers(model))
    return [place for place in open_sizes if stepwise and place[1] == 1]


def _described(specs: Specs, open_sizes: Open) -> str:
    shapes = {
        name: tuple(None if (index, axis) in open_sizes else size for axis, size in enumerate(shape) if axis)
        for index, (name, (shape, _)) in enumerate(specs.items())
    }
    return ", ".join(f"{name}={shape}" for name, shape in shapes.items())


def _tensorflow() -> tuple[Any, Any]:
    """Return TensorFlow and its function that makes variables and captures constants."""
    try:
        import tensorflow as tf
        import tf2onnx  # noqa: F401
        from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"expected the packages that export a Keras model, received no module named {error.name!r}; "
            "run pip install 'normswap[keras]'"
        ) from error
    return tf, convert_variables_to_constants_v2


@contextmanager
def inlined(tf: Any) -> Iterator[None]:
    """Let nested functions become part of the traced one: Keras compiles grouped convolutions on their own."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the converter's progress and deprecation notes off the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("tensorflow", "tf2onnx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
