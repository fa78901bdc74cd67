"""Accuracy on labelled images of whatever can be run: a model, a bundle, or an ONNX file."""

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..console import progress
from ..finetune.accuracy import Accuracy, accuracy
from ..patchers.opening import Opened
from ..sources.checks import check_labels
from ..sources.data import open_data


@dataclass
class Measured:
    """How often a model is right, and the class it says each image is of."""

    accuracy: Accuracy
    answers: Any

    def __str__(self) -> str:
        found = self.accuracy
        return f"top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} % of {found.n} images"

    def agreement(self, other: "Measured") -> float:
        """Return the share of images, in percent, that both say the same of."""
        return 100 * float((self.answers == other.answers).mean())


def measure(model: str, data: str, batch_size: int, weights: Path | None, options: dict[str, Any]) -> Measured:
    """Run a model, bundle or ONNX file on labelled images, with a bar on a terminal."""
    predict, preprocessing = _opened(model, weights, options)
    images = open_data(data, preprocessing)
    answers: list[Any] = []
    with progress(f"evaluating {model}", len(images)) as advance:

        def answer(x: Any) -> Any:
            scores = np.asarray(predict(x))
            if not answers and scores.ndim == 2:
                check_labels(images, scores.shape[1])
            answers.append(scores.argmax(axis=-1))
            return scores

        found = accuracy(answer, images, batch_size=batch_size, on_batch=lambda _: advance(sum(map(len, answers))))
    return Measured(found, np.concatenate(answers))


def _opened(model: str, weights: Path | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return a function from images to scores, and how images become its input."""
    if model.endswith(".onnx"):
        from ..export.inference import open_onnx

        return open_onnx(Path(model), options)
    opened = Opened(model, weights, options)
    engine = import_module(f"..finetune.{opened.framework}.engine", __package__)
    return partial(engine.predict, opened.model), opened.require_preprocessing()
