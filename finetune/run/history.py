"""What a run wrote down, read back: by step, and by pass over the data."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from ...bundles.manifest import RUN, is_unfinished, local
from ...errors import UnsupportedError, spoken
from .journal import METRICS, ORIGINAL, Row, read

EPOCHS = "epochs.csv"
COLUMNS = (
    "epoch",
    "step",
    "stage",
    "loss",
    "accuracy",
    "learning_rate",
    "eval_loss",
    "eval_top1",
    "eval_top5",
    "seconds",
)
_MEANS = ("loss", "accuracy")
_LAST = ("learning_rate", "eval_loss", "eval_top1", "eval_top5")
_ROUNDING = 1e-9
"""By how much a step that ends an epoch can seem to be after it."""


@dataclass(frozen=True)
class History:
    """What the run in ``path``, a bundle or what is to become one, wrote down.

    ``steps`` are the rows of its ``metrics.csv`` by step, ``original`` is the one that tells of the model before the
    patch, or None, and ``finished`` says whether the run came to its bundle.
    """

    path: Path
    steps: Sequence[Row]
    original: Row | None
    finished: bool

    @classmethod
    def of(cls, path: str | Path) -> "History":
        """Return the history of the run in ``path``, or of the folder ``run`` in it.

        Raises `UnsupportedError` where there is none.

        Example:
            >>> from normswap.finetune import History
            >>> for row in History.of("net-gn-tuned").epochs():  # doctest: +SKIP
            ...     print(row["epoch"], row["loss"], row["eval_top1"], row["seconds"])
        """
        path = folder_of(path)
        metrics = path / RUN / METRICS
        if not metrics.is_file():
            raise UnsupportedError(
                f"expected a fine-tuning run in {path}, received none; "
                f"{spoken('`normswap finetune`', '`finetune`')} makes one"
            )
        rows = read(metrics)
        original = next((row for row in rows if row["stage"] == ORIGINAL), None)
        return cls(path, [row for row in rows if row["stage"] != ORIGINAL], original, not is_unfinished(path))

    def epochs(self) -> list[Row]:
        """Return a row for each pass over the data, the last one maybe not whole, with `COLUMNS`.

        ``loss`` and ``accuracy`` are means over its steps. ``seconds`` is what a whole pass takes at the pace of the
        median step, without evaluations and what the first step compiles. All else is as at its end. It is empty for a
        run of a version that did not write down epochs.
        """
        taken = [row for row in self.steps if row["step"] and row["epoch"]]
        found = []
        for _, group in groupby(taken, key=lambda row: ceil(row["epoch"] - _ROUNDING)):
            rows = list(group)
            last = rows[-1]
            told: Row = {name: last[name] for name in ("epoch", "step", "stage")}
            told |= {name: _mean([row[name] for row in rows]) for name in _MEANS}
            told |= {name: _last([row[name] for row in rows]) for name in _LAST}
            paces = [row["seconds"] for row in rows if row["seconds"] is not None]
            found.append(told | {"seconds": median(paces) * last["step"] / last["epoch"] if paces else None})
        return found

    def summary(self) -> dict[str, Any]:
        """Return how far the run came, what it came to, and the median of what a pass over the data takes."""
        epochs, evaluated = self.epochs(), [row for row in self.steps if row["eval_top1"] is not None]
        best = max(evaluated, key=lambda row: row["eval_top1"], default=None)
        seconds = [row["seconds"] for row in epochs if row["seconds"] is not None]
        last = epochs[-1] if epochs else None
        return {
            "run": str(self.path),
            "finished": self.finished,
            "steps": self.steps[-1]["step"] if self.steps else 0,
            "epochs": last and last["epoch"],
            "loss": last and last["loss"],
            "eval_loss": evaluated[-1]["eval_loss"] if evaluated else None,
            "eval_top1": evaluated[-1]["eval_top1"] if evaluated else None,
            "best_top1": best and best["eval_top1"],
            "best_step": best and best["step"],
            "seconds_per_epoch": median(seconds) if seconds else None,
        }

    def write(self, path: Path) -> None:
        """Write `epochs` as a table."""
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(self.epochs())


def folder_of(path: str | Path) -> Path:
    """Return the folder a run is in, which may be named by its own folder ``run``, or be that of a hub's bundle."""
    path = local(path)
    return path.parent if path.name == RUN and (path / METRICS).is_file() else path


MANY = 60
"""Points, from which on a figure that jumps from step to step is shown by its running mean."""

_STEEP = 20


def running_mean(steps: Any, values: Any) -> tuple[Any, Any, int]:
    """Return the running mean of many values, each at the middle of what it is the mean of, and of how many it is."""
    window = len(values) // 15 if len(values) >= MANY else 1
    means = np.convolve(values, np.full(window, 1 / window), "valid")
    return steps[(window - 1) // 2 :][: len(means)], means, window


def steep(values: Any) -> bool:
    """Return whether losses fall so far that their axis is to be logarithmic."""
    return bool(min(values) > 0 and max(values) > _STEEP * min(values))


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
