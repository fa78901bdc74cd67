"""What a run writes down for people to watch: a table of figures, and TensorBoard events."""

import csv
import io
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...errors import MissingDependencyError
from ...sources.outputs import staged

METRICS = "metrics.csv"
EVENTS = "tensorboard"
ORIGINAL = "original"
"""The stage of the row that holds the accuracy of the model before the patch."""

FIGURES: Mapping[str, str] = {
    "epoch": "train/epoch",
    "loss": "train/loss",
    "accuracy": "train/accuracy",
    "learning_rate": "train/learning_rate",
    "images_per_second": "train/images_per_second",
    "seconds": "train/seconds",
    "eval_loss": "eval/loss",
    "eval_top1": "eval/top1",
    "eval_top5": "eval/top5",
    "drift": "eval/drift",
    "clipped": "train/clipped",
}
"""What a row may hold, and what TensorBoard calls it.

``epoch`` is how many passes over the data are done, ``seconds`` what the step took. Accuracies are in percent, drift
and clipped shares of 1.
"""

COLUMNS = ("step", "stage", *FIGURES)
GATES = ("instance", "layer", "batch")

_FLUSH_SECONDS = 5.0

Row = dict[str, Any]


class Journal:
    """Writes ``metrics.csv`` into ``folder``, a row at a time, and TensorBoard events into its folder ``tensorboard``.

    Rows are with the operating system when `row` returns, so that a killed process loses none. Events are flushed every
    few seconds and by `flush`, which belongs before a checkpoint: what follows that one is written again by the run
    that goes on from it, after `rewind`.

    Raises `MissingDependencyError` if events are wanted and tensorboardX is not installed.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        self.path = folder / METRICS
        self._events = _Events(folder / EVENTS) if tensorboard else None
        folder.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            _write(self.path, [])
        self._open()

    def _open(self) -> None:
        self._file = self.path.open("a", newline="", encoding="utf-8")
        self._table = csv.writer(self._file, lineterminator="\n")

    def row(self, step: int, *, stage: str = "", **figures: float | None) -> None:
        """Write down the `FIGURES` that are known after ``step`` steps; several rows may tell of one step.

        Raises `TypeError` for a figure of another name.
        """
        if unknown := figures.keys() - FIGURES.keys():
            raise TypeError(f"expected figures out of {', '.join(FIGURES)}, received {', '.join(sorted(unknown))}")
        known = {name: float(value) for name, value in figures.items() if value is not None}
        self._table.writerow([step, stage, *(known.get(name) for name in FIGURES)])
        self._file.flush()
        if self._events is not None and stage != ORIGINAL:
            self._events.add(step, {FIGURES[name]: value for name, value in known.items()})

    def gates(self, step: int, gates: Mapping[str, tuple[Any, Any]]) -> None:
        """Tell TensorBoard of every layer's gates; see `normswap.finetune.run.figures.gates`."""
        if self._events is not None:
            self._events.add(
                step,
                {
                    f"gates/{layer}/{which}/{name}": float(value)
                    for layer, pair in gates.items()
                    for which, values in zip(("mean", "var"), pair, strict=True)
                    for name, value in zip(GATES, values, strict=False)
                },
            )

    def rewind(self, step: int) -> None:
        """Forget what was written after ``step``, from which a run goes on, and a row that was cut off."""
        self._file.close()
        _write(self.path, [row for row in read(self.path) if row["step"] <= step])
        self._open()
        if self._events is not None:
            self._events.forget_from(step + 1)

    def flush(self) -> None:
        """Bring all to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flush, and write no more."""
        self.flush()
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path) -> list[Row]:
    """Return the rows of a ``metrics.csv``, up to the first that is not whole: an int, a string, and floats or None.

    A column that an older version did not write is None.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    rows: list[Row] = []
    with suppress(KeyError, ValueError, csv.Error):
        for line in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")):
            figures = {name: float(line[name]) if line.get(name) else None for name in FIGURES}
            if None in line or None in line.values():
                break
            rows.append({"step": int(line["step"]), "stage": line["stage"], **figures})
    return rows


def _write(path: Path, rows: list[Row]) -> None:
    """Write the table anew, whole or not at all."""
    with staged(path, overwrite=True) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


class _Events:
    """One TensorBoard event file, written by the calling thread: all the figures of a step are one record."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import RecordWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        except ModuleNotFoundError:
            raise MissingDependencyError("TensorBoard events need tensorboardX: pip install 'normswap[plot]'") from None
        self._event, self._session = event_pb2.Event, event_pb2.SessionLog
        self._summary = summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._records = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}"))
        self._flushed = time.monotonic()
        self._write(file_version="brain.Event:2")

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        self._write(step=step, summary=self._summary(value=values))

    def forget_from(self, step: int) -> None:
        """Let TensorBoard drop what earlier files say of ``step`` and later ones."""
        self._write(step=step, session_log=self._session(status=self._session.START))

    def _write(self, **event: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **event).SerializeToString())
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._records.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self.flush()
        self._records.close()
