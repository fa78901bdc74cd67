"""A Keras model to a proven file for LiteRT."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError, VerificationError
from ..frameworks.detect import framework_of
from ..sources.outputs import staged
from ..verification.verify import verify
from .contract import tracer_of
from .onnx import ExportReport, example_or_drawn


def to_litert(
    model: Any,
    path: str | Path,
    *,
    example: Any = None,
    data: Sequence[Any] | None = None,
    dynamic_size: bool = False,
    overwrite: bool = False,
    check: bool = True,
) -> ExportReport:
    """Write a Keras ``model`` in inference mode to a TFLite file, and prove the file in LiteRT.

    TensorFlow's converter folds norms of constant statistics and writes others as the layers compute them. The batch
    stays free unless the model fixes it, with ``dynamic_size`` the sizes that the model leaves open, too. Else as
    `normswap.to_onnx`.

    Raises:
        UnsupportedError: For a model that is not of Keras on TensorFlow, or uses what TFLite lacks.
        MissingDependencyError: If LiteRT is not installed, without which nothing is proved.
        VerificationError: If the file computes something else than the model.
        OutputExistsError: If ``path`` exists.
    """
    path = Path(path)
    if (framework := framework_of(model)) != "keras":
        raise UnsupportedError(
            f"expected a Keras model for LiteRT, received one of {framework}; write an ONNX file, which onnxruntime, "
            "OpenVINO and onnxruntime-web run on every device that LiteRT does"
        )
    tracer = tracer_of(model)
    if problem := tracer.refusal(model):
        raise UnsupportedError(problem)
    from .keras.tflite import convert

    inputs = example_or_drawn(model, example)
    with staged(path, overwrite=overwrite) as temporary:
        content, shapes = convert(model, inputs, dynamic=dynamic_size)
        temporary.write_bytes(content)
        verdict = verify(model, temporary, example=inputs, data=data, runtime="litert") if check else None
        if verdict is not None and not verdict:
            raise VerificationError(verdict.explain(str(path)))
    return ExportReport(path, shapes, {}, {}, _operators(content), len(content), verdict, tracer.notes(model))


def _operators(content: bytes) -> int:
    """Return how many operators a TFLite file has."""
    from tensorflow.lite.python import schema_py_generated as schema

    graph = schema.Model.GetRootAsModel(content, 0).Subgraphs(0)
    return int(graph.OperatorsLength())
