"""Run an ONNX file for its predictions alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.preprocessing import Preprocessing
from ..errors import InputError, spoken
from .file import read_model
from .runtime import TIMEOUT, answers, session

Predict = Callable[[NDArray[Any]], NDArray[Any]]


def open_onnx(
    path: Path,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    timeout: float = TIMEOUT,
) -> tuple[Predict, Preprocessing]:
    """Return a function from a batch of images to scores in onnxruntime, and how images become its input.

    The preprocessing is the file's own, with ``mean`` and ``std`` in its place where they are given.
    Raises `InputError` if the file is no ONNX model of one input, or does not tell its preprocessing; the function does
    if it takes more than ``timeout`` seconds.
    """
    file = read_model(path)
    stored = file.metadata.get("preprocessing")
    if len(file.inputs) != 1:
        verify = spoken("normswap verify", "normswap.verify")
        raise InputError(
            f"expected a file with one input to evaluate, received {len(file.inputs)}; hold it against its model by "
            f"{verify}"
        )
    if stored is None:
        raise InputError(f"expected a file that says how images become its input, received {path} without; "
                         f"export it with {spoken('--input-shape', 'metadata=')}")  # fmt: skip
    known = Preprocessing.from_dict(stored, file.told("preprocessing"))
    changed = replace(known, mean=known.mean if mean is None else mean, std=known.std if std is None else std)
    runner = session(file.content, folder=path.parent)
    entry = runner.get_inputs()[0]
    dtype = np.float16 if entry.type == "tensor(float16)" else np.float32

    def predict(x: NDArray[Any]) -> NDArray[Any]:
        try:
            result: NDArray[Any] = answers(runner, None, {entry.name: x.astype(dtype, copy=False)}, timeout=timeout)[0]
        except InputError:
            raise
        except Exception as error:
            told = str(error).strip().rstrip(".")
            raise InputError(
                f"expected images the file takes, received some on which it fails: {told}; give images of the size "
                "that it was exported for"
            ) from None
        return result

    return predict, changed
