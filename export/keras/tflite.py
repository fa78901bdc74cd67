"""A Keras model on TensorFlow to a TFLite file, by TensorFlow's own converter."""

from typing import Any

import keras

from ...errors import InputError, UnsupportedError, said
from ...frameworks.example import Inputs
from ...frameworks.keras import Interface, inference, named_outputs, opened, single_precision
from ..traced import Program
from .tf2onnx import inlined, quiet, with_constants


def convert(model: Any, example: Inputs, *, dynamic: bool = False) -> Program:
    """Return ``model`` in inference mode as a TFLite file of one signature.

    The inputs and outputs are named as in an ONNX file. The first sizes are open where TensorFlow can trace the model
    so, with ``dynamic`` the other sizes that the model leaves open, too.

    Raises `UnsupportedError` for another backend, and for what TensorFlow cannot trace or TFLite lacks.
    """
    if (backend := keras.backend.backend()) != "tensorflow":
        raise UnsupportedError(
            f"expected the tensorflow backend for LiteRT, received backend={backend!r}; save the model as .keras and "
            "export it with KERAS_BACKEND=tensorflow"
        )
    import tensorflow as tf

    inputs = Interface(model, example)
    behind: list[tuple[int | None, ...]] = [tuple(shape[1:]) for shape, _ in inputs.specs.values()]
    if dynamic:
        behind = opened(model, behind)

    def run(*tensors: Any) -> dict[str, Any]:
        return named_outputs(inputs.call(tensors), model, taken=inputs.names)

    frozen = with_constants(tf, run, model)

    def named(**tensors: Any) -> dict[str, Any]:
        return dict(frozen(*(tensors[name] for name in inputs.specs)))

    def traced(*, fixed: bool) -> Any:
        specs = {
            name: tf.TensorSpec([shape[0] if fixed else None, *sizes], dtype)
            for (name, (shape, dtype)), sizes in zip(inputs.specs.items(), behind, strict=True)
        }
        return tf.function(named, autograph=False).get_concrete_function(**specs)

    with inference(model), single_precision(model), quiet(), inlined(tf):
        try:
            try:
                function = traced(fixed=False)
            except (InputError, UnsupportedError):
                raise
            except Exception:
                function = traced(fixed=True)
            content: bytes = tf.lite.TFLiteConverter.from_concrete_functions([function], tf.Module()).convert()
        except (InputError, UnsupportedError):
            raise
        except Exception as error:
            raise UnsupportedError(
                f"expected a model that TFLite can hold, received {_reason(error).rstrip('.')}; write an ONNX file"
            ) from error
    shapes = {name: tensor.shape.as_list() for name, tensor in zip(inputs.specs, function.inputs, strict=True)}
    taken = {
        name: ["batch" if axis == 0 and size is None else size for axis, size in enumerate(shape)]
        for name, shape in shapes.items()
    }
    return Program(content, taken, _operators(content))


def _operators(content: bytes) -> int:
    """Return how many operators a TFLite file has."""
    from tensorflow.lite.python import schema_py_generated as schema

    graph = schema.Model.GetRootAsModel(content, 0).Subgraphs(0)
    return int(graph.OperatorsLength())


def _reason(error: Exception) -> str:
    """Return what the converter says of the operators that it lacks, or else its first line."""
    lines = [line.strip() for line in said(error).splitlines() if line.strip()]
    lacking = next((line for line in lines if line.startswith(("Flex ops:", "Custom ops:"))), None)
    return f"operators that it lacks: {lacking.partition(':')[2].strip()}" if lacking else (lines or ["no reason"])[0]
