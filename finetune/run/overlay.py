"""One picture of several fine-tunings: what each came to, over the same epochs."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ...errors import UnsupportedError, UsageError
from .history import History, running_mean
from .journal import Row
from .plots import BLUE, FEW, GREEN, ORANGE, SKY, VERMILION, WIDTH, log_if_steep, short, style

_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, SKY, "#CC79A7", "black")
_DASHES: tuple[Literal["-", "--", ":", "-."], ...] = (
    "-",
    "--",
    ":",
    "-.",
)  # a colour comes again with the next of these
_PANELS = (
    ("loss", "training loss"),
    ("eval_loss", "evaluation loss"),
    ("accuracy", "training accuracy, %"),
    ("eval_top1", "evaluation top-1, %"),
    ("learning_rate", "learning rate"),
    ("seconds", "seconds per epoch"),
)
_BY_EPOCH = ("seconds",)
_PANEL, _HEAD, _ENTRY = 2.6, 0.5, 0.22
_LEGEND_COLUMNS = 3


def overlay(histories: Sequence[History]) -> Figure:
    """Return the curves of several runs, a panel for each figure that one of them has, over epochs.

    Where a run does not tell epochs they are drawn over steps, and seconds per epoch are left out.

    Raises `UnsupportedError` for a run that has taken no step, `UsageError` for one that is given twice.
    """
    _check(histories)
    by = "epoch" if all(row["epoch"] is not None for each in histories for row in each.steps) else "step"
    curves = [_rows(history, by) for history in histories]
    panels = [
        (column, label)
        for column, label in _PANELS
        if any(row[column] is not None for rows in curves for row in rows[column in _BY_EPOCH])
    ]
    styles = [(colour, dash) for dash in _DASHES for colour in _COLOURS]
    lines, deep = [style for style, _ in zip(cycle(styles), histories, strict=False)], -(-len(panels) // 2)
    entries = -(-len(histories) // _LEGEND_COLUMNS)
    figure = Figure(figsize=(WIDTH, _HEAD + _ENTRY * entries + _PANEL * deep), layout="constrained")
    grid = figure.add_gridspec(deep, 2)
    for number, (column, label) in enumerate(panels):
        axes = figure.add_subplot(grid[number // 2, number % 2 if number + 1 < len(panels) or number % 2 else slice(2)])
        for rows, (colour, dash) in zip(curves, lines, strict=True):
            _line(axes, rows[column in _BY_EPOCH], by, column, colour, dash)
        axes.set(xlabel=by, ylabel=label, xlim=(0, max(rows[0][-1][by] for rows in curves)))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=by == "step", steps=(1, 2, 5, 10)))
        if column in ("loss", "eval_loss"):
            log_if_steep(axes, np.concatenate([line.get_ydata() for line in axes.lines]))
        elif column in ("seconds", "learning_rate"):
            axes.set_ylim(bottom=0)
        style(axes, share=label.endswith("%"))
    handles = [
        Line2D([], [], color=colour, linestyle=dash, linewidth=1.8, label=name)
        for name, (colour, dash) in zip(_names(histories), lines, strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=_LEGEND_COLUMNS, frameon=False, fontsize=9,
                  handlelength=2.5)  # fmt: skip
    return figure


def _check(histories: Sequence[History]) -> None:
    places = [history.path.resolve() for history in histories]
    for history in histories:
        if places.count(history.path.resolve()) > 1:
            raise UsageError(f"expected different runs, received {history.path} twice; leave one out")
        if not any(row["step"] for row in history.steps):
            raise UnsupportedError(
                f"expected runs that have taken a step, received {history.path} without; leave it out, or draw it alone"
            )


def _rows(history: History, by: str) -> tuple[list[Row], list[Row]]:
    """Return the rows of a run by step and by epoch; there are none of the latter over steps."""
    return list(history.steps), history.epochs() if by == "epoch" else []


def _line(axes: Axes, rows: Sequence[Row], by: str, column: str, colour: str, dash: str) -> None:
    """Draw a column of one run, its running mean where it jumps from step to step."""
    points = [(row[by], row[column]) for row in rows if row[column] is not None]
    if not points:
        return
    places, values = np.array(points, float).T
    if column in ("loss", "accuracy"):
        places, values, _ = running_mean(places, values)
    few = len(values) <= FEW
    axes.plot(places, values, color=colour, linestyle=dash, linewidth=1.5, marker="o" if few else "", markersize=3.5,
              clip_on=not few)  # fmt: skip


def _names(histories: Sequence[History]) -> list[str]:
    """Return what each run is called: so much of its path as tells it from the others, and what is special of it."""
    paths = [history.path.resolve().parts for history in histories]
    depth = next(n for n in range(1, max(map(len, paths)) + 1) if len({path[-n:] for path in paths}) == len(paths))
    found = []
    for path, history in zip(paths, histories, strict=True):
        notes = [] if history.finished else ["not ended"]
        if all(row["eval_top1"] is None for row in history.steps):
            notes.append("not evaluated")
        name = short(str(Path(*path[-depth:])))
        found.append(f"{name} ({', '.join(notes)})" if notes else name)
    return found
