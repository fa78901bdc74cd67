"""What a page shows of a fine-tuning: its curves, as the journal has them, and what it came to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..finetune.run.history import MANY, History, running_mean, steep
from .charts import Line, curves, drawable
from .page import Block, Facts, Figure, Figures, Section, Text, Tile

_LARGEST = 2**53
"""The step from which on a number in a file is none of a step."""


@dataclass(frozen=True)
class _Panel:
    """A picture: its title, and the columns in it, each with its name and colour."""

    title: str
    columns: Sequence[tuple[str, str, str]]
    factor: float = 1.0


_PANELS = (
    _Panel("Loss in training", [("loss", "training", "blue")]),
    _Panel("Top-1 accuracy, %", [("accuracy", "training", "sky"), ("eval_top1", "evaluation", "vermilion")]),
    _Panel("Loss in evaluation", [("eval_loss", "evaluation", "vermilion")]),
    _Panel("Learning rate", [("learning_rate", "learning rate", "green")]),
    _Panel("Drift of the scores from the original", [("drift", "drift", "grey")]),
    _Panel("Channels that BRN clips, %", [("clipped", "clipped", "orange")], factor=100.0),
    _Panel("Images per second", [("images_per_second", "images per second", "blue")]),
)
_JUMPING = ("loss", "accuracy", "clipped", "images_per_second")
"""What jumps from step to step, of which a running mean is drawn on top."""


def section_of(history: History) -> Section:
    """Return what a run wrote down."""
    told = history.summary()
    original = None if history.original is None else history.original["eval_top1"]
    stages = dict.fromkeys(row["stage"] for row in history.steps if row["stage"])
    blocks: list[Block] = [
        Facts(
            {
                "steps": str(told["steps"]),
                "came to its end": "yes" if told["finished"] else "no, the curves are as far as it came",
                "passes over data": None if told["epochs"] is None else f"{told['epochs']:.2f}",
                "stages": ", then ".join(stages),
                "best top-1": _best(told),
                "original's top-1": None if original is None else f"{original:.2f} %",
                "time per pass": None if told["seconds_per_epoch"] is None else f"{told['seconds_per_epoch']:.3g} s",
            }
        )
    ]
    figures = [figure for panel in _PANELS if (figure := _figure(panel, history, original)) is not None]
    blocks.append(Figures(figures) if figures else Text("It has taken no step of which there is a curve."))
    return Section("Fine-tuning", blocks)


def tiles_of(history: History) -> list[Tile]:
    """Return what is to be seen first of a run."""
    told = history.summary()
    original = None if history.original is None else history.original["eval_top1"]
    tiles = [Tile("steps", str(told["steps"]), "" if told["finished"] else "has not ended")]
    if told["best_top1"] is not None:
        beside = "" if original is None else f"original {original:.2f} %"
        tiles.append(Tile("best top-1", f"{told['best_top1']:.2f} %", beside))
    return tiles


def _best(told: dict[str, Any]) -> str | None:
    return None if told["best_top1"] is None else f"{told['best_top1']:.2f} % at step {told['best_step']}"


def _figure(panel: _Panel, history: History, original: float | None) -> Figure | None:
    """Return the picture of a panel, None where nothing of it is known."""
    lines: list[Line] = []
    notes = []
    for column, name, colour in panel.columns:
        points = _points(history, column, panel.factor)
        if len(points) >= MANY and column in _JUMPING:
            steps, values = zip(*points, strict=True)
            places, means, window = running_mean(steps, values)
            lines.append(Line(f"{name} by step", points, colour, thin=True))
            points = list(zip(places, map(float, means), strict=True))
            notes.append(f"The strong line of {name} is the mean of {window} steps.")
        if points:
            lines.append(Line(name, points, colour))
    if not lines:
        return None
    first, last = min(line.points[0][0] for line in lines), max(line.points[-1][0] for line in lines)
    if "eval_top1" in (column for column, _, _ in panel.columns) and drawable(original):
        assert original is not None
        lines.append(Line(f"original {original:.2f}", [(first, original), (last, original)], "grey", dashed=True))
    legend = [(line.colour, line.name) for line in lines if not line.thin]
    logarithmic = panel.title.startswith("Loss") and steep([y for line in lines for _, y in line.points])
    picture = curves(panel.title, lines, logarithmic=logarithmic)
    return Figure(panel.title, picture, legend if len(legend) > 1 else (), " ".join(notes))


def _points(history: History, column: str, factor: float) -> list[tuple[float, float]]:
    rows = [row for row in history.steps if 0 <= row["step"] < _LARGEST and drawable(row[column])]
    return [(float(row["step"]), row[column] * factor) for row in rows]
