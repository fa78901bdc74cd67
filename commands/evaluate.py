"""The command that measures accuracy: evaluate."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import progress, show
from .options import json_option, model_options, positive, timeout_option

if TYPE_CHECKING:
    from ..bundles.opening import ModelOptions
    from ..data.preprocessing import Preprocessing
    from ..finetune.run.accuracy import Accuracy


@click.command()
@click.argument("model")
@click.option("--data", required=True, help="Labelled images.")
@click.option("--against", help="Model or bundle to compare with: its accuracy, and how often both say the same.")
@click.option("--batch-size", default=250, show_default=True, callback=positive)
@timeout_option
@model_options("example")
@json_option
def evaluate(
    model: str,
    data: str,
    against: str | None,
    batch_size: int,
    timeout: float,
    known: "ModelOptions",
    as_json: bool,
) -> None:
    """Measure the accuracy of MODEL, a bundle, or an ONNX file (run in onnxruntime).

    \b
    Examples:
      normswap evaluate net-gn --data val/
      normswap evaluate net-gn.onnx --data val/ --against net-gn
    """
    from ..bundles.opening import require_read

    require_read(known, *(each for each in (model, against) if each is not None))
    first, *others = [(each, *_opened(each, known, timeout)) for each in (model, against) if each is not None]
    found = measure(*first, data, batch_size)
    result, text = {"model": model, **found.accuracy.to_dict()}, str(found)
    for other in others:
        second = measure(*other, data, batch_size)
        agreement = found.agreement(second)
        result |= {"against": {"model": against, **second.accuracy.to_dict()}, "agreement": agreement}
        text = f"{model}: {found}\n{against}: {second}\nboth say the same of {agreement:.2f} % of the images"
    show(as_json, result, text)


@dataclass
class Measured:
    """How often a model is right, and the class it says each image is of."""

    accuracy: "Accuracy"
    answers: Any

    def __str__(self) -> str:
        found = self.accuracy
        return f"top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} % of {found.n} images"

    def agreement(self, other: "Measured") -> float:
        """Return the share of images, in percent, that both say the same of."""
        return 100 * float((self.answers == other.answers).mean())


def measure(
    model: str, predict: Callable[[Any], Any], preprocessing: "Preprocessing", data: str, batch_size: int
) -> Measured:
    """Run what ``model`` names on labelled images, with a bar on a terminal."""
    import numpy as np

    from ..data.dataset import open_data
    from ..data.labels import check_labels
    from ..finetune.run.accuracy import accuracy

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


def _opened(model: str, known: "ModelOptions", timeout: float) -> tuple[Callable[[Any], Any], "Preprocessing"]:
    """Return a model's, bundle's or file's function from images to scores, and how images become its input.

    It reads what it has a use for of the options.
    """
    from ..bundles.opening import Opened, is_onnx, reads

    if is_onnx(model):
        from ..verification.inference import open_onnx

        return open_onnx(Path(model), mean=known.mean, std=known.std, timeout=timeout)
    from ..finetune.run.contract import trainer_of
    from ..finetune.run.evaluation import scores_of

    opened = Opened(model, known.only(*reads(model)))
    return partial(scores_of, trainer_of(opened.model), opened.model), opened.require_preprocessing()
