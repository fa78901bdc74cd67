"""Run an ONNX file for its predictions alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import InputError
from ..sources.data import Preprocessing
from .verify import metadata, read_model, session


def open_onnx(path: Path, options: Mapping[str, Any]) -> tuple[Callable[[NDArray[Any]], NDArray[Any]], Preprocessing]:
    """Return a function from a batch of images to scores in onnxruntime, and how images become its input.

    The preprocessing is the file's own, with what ``options`` (``mean``, ``std``) say in its place.
    Raises `InputError` if the file is no ONNX model of one input, or does not tell its preprocessing.
    """
    stored = metadata(read_model(path)).get("preprocessing")
    runner = session(path)
    inputs = runner.get_inputs()
    if len(inputs) != 1:
        raise InputError(f"expected a file with one input to evaluate, received {len(inputs)}")
    if stored is None:
        raise InputError(f"expected a file that says how images become its input, received {path} without; "
                         "export it with --input-shape")  # fmt: skip
    stored |= {name: options[name] for name in ("mean", "std") if options.get(name) is not None}
    name = inputs[0].name

    def predict(x: NDArray[Any]) -> NDArray[Any]:
        result: NDArray[Any] = runner.run(None, {name: x})[0]
        return result

    return predict, Preprocessing.from_dict(stored)
