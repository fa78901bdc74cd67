"""A model to a proven file for a runtime of phones: one of Keras for LiteRT, one of PyTorch for ExecuTorch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError, VerificationError
from ..frameworks.detect import framework_of
from ..frameworks.example import Inputs
from ..sources.outputs import staged
from ..verification.verify import verify
from .contract import tracer_of
from .onnx import ExportReport, example_or_drawn
from .traced import Program


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
    if (framework := framework_of(model)) != "keras":
        raise UnsupportedError(
            f"expected a Keras model for LiteRT, received one of {framework}; write an ONNX file, which onnxruntime, "
            "OpenVINO and onnxruntime-web run on every device that LiteRT does, or a file for ExecuTorch"
        )

    def convert(inputs: Inputs) -> Program:
        from .keras.tflite import convert

        return convert(model, inputs, dynamic=dynamic_size)

    return _proven(model, Path(path), "litert", convert, example, data, overwrite=overwrite, check=check)


def to_executorch(
    model: Any,
    path: str | Path,
    *,
    example: Any = None,
    data: Sequence[Any] | None = None,
    overwrite: bool = False,
    check: bool = True,
) -> ExportReport:
    """Write a PyTorch ``model`` in inference mode to a file of ExecuTorch, and prove the file there.

    What XNNPACK has is left to it, the rest to ExecuTorch's portable kernels. The batch stays free up to 32 samples,
    or those of the example where it has more, unless the model fixes it. Else as `normswap.to_onnx`.

    Raises:
        UnsupportedError: For a model that is not of PyTorch, that torch.export fails on, or that uses what ExecuTorch
            lacks.
        MissingDependencyError: If ExecuTorch is not installed.
        VerificationError: If the file computes something else than the model.
        OutputExistsError: If ``path`` exists.
    """
    if (framework := framework_of(model)) != "torch":
        raise UnsupportedError(
            f"expected a PyTorch model for ExecuTorch, received one of {framework}; write a TFLite file for LiteRT"
        )

    def convert(inputs: Inputs) -> Program:
        from .torch.executorch import convert

        return convert(model, inputs)

    return _proven(model, Path(path), "executorch", convert, example, data, overwrite=overwrite, check=check)


def _proven(
    model: Any,
    path: Path,
    runtime: str,
    convert: Callable[[Inputs], Program],
    example: Any,
    data: Sequence[Any] | None,
    *,
    overwrite: bool,
    check: bool,
) -> ExportReport:
    """Write what ``convert`` makes of a model to a file, and prove the file in the runtime it is for."""
    tracer = tracer_of(model)
    if problem := tracer.refusal(model):
        raise UnsupportedError(problem)
    inputs = example_or_drawn(model, example)
    notes = tracer.notes(model)
    with staged(path, overwrite=overwrite) as temporary:
        program = convert(inputs)
        temporary.write_bytes(program.content)
        verdict = verify(model, temporary, example=inputs, data=data, runtime=runtime) if check else None
        if verdict is not None and not verdict:
            raise VerificationError(verdict.explain(str(path)))
    size, notes = len(program.content), [*notes, *program.notes]
    return ExportReport(path, program.inputs, {}, {}, program.operators, size, verdict, notes)
