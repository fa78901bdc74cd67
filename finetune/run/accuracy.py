"""Top-1 and top-5 accuracy of anything that maps a batch of images to scores."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.dataset import Data
from ...errors import InputError, VerificationError


@dataclass(frozen=True)
class Accuracy:
    """Shares of ``n`` images, in percent, whose label is the highest score and among the five highest."""

    top1: float
    top5: float
    n: int

    @classmethod
    def merged(cls, parts: Sequence["Accuracy"]) -> "Accuracy":
        """Return the accuracy on all images of several parts."""
        n = sum(part.n for part in parts)
        return cls(sum(p.top1 * p.n for p in parts) / n, sum(p.top5 * p.n for p in parts) / n, n)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self)


def accuracy(
    predict: Callable[[NDArray[np.float32]], NDArray[Any]],
    data: Data,
    *,
    batch_size: int = 250,
    share: tuple[int, int] = (0, 1),
    on_batch: Callable[[int], None] | None = None,
) -> Accuracy:
    """Return the accuracy on all of ``data``; ``on_batch`` is told the size of each finished batch.

    ``share`` is the number of a process and that of all: of n processes each sees every n-th batch.

    Raises `InputError` if a label has no score, `VerificationError` if a score is not finite.
    """
    top1 = top5 = n = 0
    for start in range(share[0] * batch_size, len(data), share[1] * batch_size):
        x, labels = data.batch(range(start, min(start + batch_size, len(data))))
        n += len(labels)
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
    return Accuracy(100 * top1 / max(1, n), 100 * top5 / max(1, n), n)
