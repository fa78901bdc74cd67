"""Top-1 and top-5 accuracy, and loss, of anything that maps a batch of images to scores."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.dataset import Data
from ...errors import InputError, VerificationError


@dataclass(frozen=True)
class Accuracy:
    """Shares of ``n`` images, in percent, whose label is the highest score and among the five highest.

    ``loss`` is their mean cross-entropy, where it was asked for.
    """

    top1: float
    top5: float
    n: int
    loss: float | None = None

    @classmethod
    def merged(cls, parts: Sequence["Accuracy"]) -> "Accuracy":
        """Return the accuracy on all images of several parts."""
        n = sum(part.n for part in parts)
        losses = [part.loss * part.n for part in parts if part.loss is not None]
        loss = sum(losses) / n if len(losses) == len(parts) else None
        return cls(sum(p.top1 * p.n for p in parts) / n, sum(p.top5 * p.n for p in parts) / n, n, loss)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures that are known as plain data."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def accuracy(
    predict: Callable[[NDArray[np.float32]], NDArray[Any]],
    data: Data,
    *,
    batch_size: int = 250,
    share: tuple[int, int] = (0, 1),
    logits: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Accuracy:
    """Return the accuracy on all of ``data``; ``on_batch`` is told the size of each finished batch.

    ``share`` is the number of a process and that of all: of n processes each sees every n-th batch. With ``logits``,
    which makes logits of scores, the loss is measured too.

    Raises `InputError` if a label has no score, `VerificationError` if a score is not finite.
    """
    top1 = top5 = n = 0
    loss, (rank, world) = 0.0, share
    batch_size = min(batch_size, max(1, -(-len(data) // world)))  # else some would wait for others
    for start in range(rank * batch_size, len(data), world * batch_size):
        x, labels = data.batch(range(start, min(start + batch_size, len(data))))
        n += len(labels)
        scores = np.asarray(predict(x))
        if scores.ndim != 2 or len(scores) != len(labels) or labels.max() >= scores.shape[1]:
            raise InputError(
                f"expected scores of shape ({len(labels)}, classes) for labels up to {labels.max()}, "
                f"received {scores.shape}"
            )
        if not np.isfinite(scores).all():
            raise VerificationError("expected finite scores, received NaN or infinity")
        own = np.take_along_axis(scores, labels[:, None], axis=1)
        # Ties count as higher: a constant output is no better than a wrong one.
        higher = (scores >= own).sum(axis=1) - 1
        top1 += int((higher < 1).sum())
        top5 += int((higher < 5).sum())
        if logits is not None:
            loss += _cross_entropy(np.asarray(logits(scores), np.float64), labels)
        if on_batch is not None:
            on_batch(len(labels))
    return Accuracy(100 * top1 / max(1, n), 100 * top5 / max(1, n), n, None if logits is None else loss / max(1, n))


def _cross_entropy(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Return the sum of -log softmax(logits)[label] over the samples."""
    below = logits - logits.max(axis=1, keepdims=True)
    own = np.take_along_axis(below, labels[:, None], axis=1)
    return float((np.log(np.exp(below).sum(axis=1)) - own[:, 0]).sum())
