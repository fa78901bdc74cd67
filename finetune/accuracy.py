"""Top-1 and top-5 accuracy of anything that maps a batch of images to scores."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, VerificationError
from ..sources.data import Data


@dataclass(frozen=True)
class Accuracy:
    """Shares of ``n`` images, in percent, whose label is the highest score and among the five highest."""

    top1: float
    top5: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self)


def accuracy(
    predict: Callable[[NDArray[np.float32]], NDArray[Any]],
    data: Data,
    *,
    batch_size: int = 250,
    on_batch: Callable[[int], None] | None = None,
) -> Accuracy:
    """Return the accuracy on all of ``data``; ``on_batch`` is told the size of each finished batch.

    Raises `InputError` if a label has no score, `VerificationError` if a score is not finite.
    """
    top1 = top5 = 0
    for x, labels in data.batches(batch_size):
        scores = np.asarray(predict(x))
        if scores.ndim != 2 or labels.max() >= scores.shape[1]:
            raise InputError(
                f"expected scores of shape (N, classes) for labels up to {labels.max()}, received {scores.shape}"
            )
        if not np.isfinite(scores).all():
            raise VerificationError("expected finite scores, received NaN or infinity")
        own = np.take_along_axis(scores, labels[:, None], axis=1)
        # Ties count as higher: a constant output is no better than a wrong one.
        higher = (scores >= own).sum(axis=1) - 1
        top1 += int((higher < 1).sum())
        top5 += int((higher < 5).sum())
        if on_batch is not None:
            on_batch(len(labels))
    return Accuracy(100 * top1 / len(data), 100 * top5 / len(data), len(data))
