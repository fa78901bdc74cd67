"""Pictures of a fine-tuning: its curves, and the gates of every layer."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator

from ...bundles.manifest import RUN
from ...errors import UnsupportedError, spoken
from .contract import Gates
from .history import MANY, running_mean, steep
from .journal import GATES, METRICS, ORIGINAL, Row, read

# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, SKY, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00", "#767676"
GATE_COLOURS = (ORANGE, SKY, BLUE)

FORMATS = (".png", ".svg", ".pdf")
WIDTH = 10.0
"""Inches."""

_PANEL, _ROW, _MAP, _HEAD = 2.6, 0.2, 2.6, 0.9
_LONGEST_NAME = 44
_METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def picture(bundle: Path, gates: Gates) -> Figure:
    """Return all there is to see of a bundle: the curves of the run that made it, and its model's gates.

    Raises `UnsupportedError` if there is neither.
    """
    metrics = bundle / RUN / METRICS
    rows = read(metrics) if metrics.is_file() else []
    parts: list[tuple[float, Callable[[FigureBase, Any], None], Any]] = []
    if _panels(rows):
        parts.append((_curves_height(rows), _curves, rows))
    if gates:
        parts += [(_MAP, _gate_map, gates), (_bars_height(gates), _gate_bars, gates)]
    if not parts:
        raise UnsupportedError(
            f"expected a bundle with curves or gates, received {bundle} without; "
            f"{spoken('`normswap finetune`', '`finetune`')} writes curves, and "
            f"{spoken('`normswap patch --to sn`', 'patching to SwitchNorm')} makes layers with gates"
        )
    heights = [height for height, _, _ in parts]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    pieces = np.atleast_1d(figure.subfigures(len(parts), 1, height_ratios=heights))  # type: ignore[arg-type]
    for piece, (_, draw, what) in zip(pieces, parts, strict=True):
        draw(piece, what)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a picture in the format of its suffix, one of `FORMATS`: the same bytes for the same picture."""
    with rc_context({"svg.hashsalt": "normswap", "svg.fonttype": "path"}):
        figure.savefig(path, dpi=110, metadata=_METADATA[path.suffix.lower()])


# Curves: each panel is a title and the lines in it.

_Line = tuple[str, str, str]  # a column, what the legend calls it, its colour
_PANELS: tuple[tuple[str, tuple[_Line, ...]], ...] = (
    ("loss", (("loss", "", BLUE),)),
    ("top-1 accuracy, %", (("accuracy", "training", SKY), ("eval_top1", "evaluation", VERMILION))),
    ("learning rate", (("learning_rate", "", GREEN),)),
    ("clipped channels, %", (("clipped", "", ORANGE),)),
    ("drift from the original", (("drift", "", GREY),)),
)
FEW = 25
"""Points, up to which each is marked."""
_ROOM = 0.12  # share of the axis a stage's name needs
_NOISY = ("loss", "accuracy", "clipped")
_PERCENT = ("clipped",)
_ABOVE = 0.02  # share of the axis that shares may leave above 100 % and below 0


def _panels(rows: list[Row]) -> list[tuple[str, tuple[_Line, ...]]]:
    """Return the panels there is something to draw in."""
    trained = [row for row in rows if row["stage"] != ORIGINAL]
    return [
        (title, lines)
        for title, lines in _PANELS
        if any(row[column] is not None for row in trained for column, _, _ in lines)
    ]


def _curves_height(rows: list[Row]) -> float:
    panels = len(_panels(rows)) if rows[-1]["step"] else 0
    return _HEAD + _PANEL * min(2, (panels + 1) // 2)


def _curves(figure: FigureBase, rows: list[Row]) -> None:
    figure.suptitle("Fine-tuning", fontsize=12, fontweight="bold")
    panels = _panels(rows)
    original = next((row["eval_top1"] for row in rows if row["stage"] == ORIGINAL), None)
    trained = [row for row in rows if row["stage"] != ORIGINAL]
    end = trained[-1]["step"]
    if not end:
        figure.text(0.5, 0.4, _before(trained[-1], original), ha="center", va="center", fontsize=10)
        return
    for (label, lines), axes in zip(panels, _grid(figure, len(panels)), strict=True):
        for column, name, colour in lines:
            _line(axes, trained, column, name, colour)
        if "eval_top1" in (column for column, _, _ in lines):
            if original is not None:
                axes.axhline(original, color="black", linestyle="--", linewidth=1, label=f"original {original:.2f}")
            _mark_best(axes, trained)
        _stages(axes, trained, end)
        axes.set(xlabel="step", ylabel=label, xlim=(0, end))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=(1, 2, 5, 10)))
        style(axes, share=label.endswith("%"))
        if told := axes.get_legend_handles_labels()[1]:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.06), ncols=3 if len(told) < 4 else 2, frameon=False,
                        fontsize=8, borderaxespad=0, handlelength=1.5, columnspacing=1.2)  # fmt: skip


def _before(row: Row, original: float | None) -> str:
    """Return in words what is known of a run that has taken no step, of which there is no curve."""
    known = {"top-1 {:.2f} %": row["eval_top1"], "original {:.2f} %": original, "drift {:.3g}": row["drift"]}
    return ", ".join(["no steps", *(text.format(value) for text, value in known.items() if value is not None)])


def _mark_best(axes: Axes, rows: list[Row]) -> None:
    """Mark the highest accuracy, the first of equals, whose model a run keeps."""
    evaluated = [row for row in rows if row["eval_top1"] is not None]
    if evaluated:
        best = max(evaluated, key=lambda row: row["eval_top1"])
        axes.plot([best["step"]], [best["eval_top1"]], color=VERMILION, linestyle="", marker="*", markersize=13,
                  markeredgecolor="white", clip_on=False, zorder=3,
                  label=f"best {best['eval_top1']:.2f}, step {best['step']}")  # fmt: skip


def _grid(figure: FigureBase, count: int) -> list[Axes]:
    """Return axes in a row of up to two, and in one below it that the others share."""
    rows = [min(count, 2), *([count - 2] if count > 2 else [])]
    grid = figure.add_gridspec(len(rows), 6)
    return [
        figure.add_subplot(grid[row, 6 * i // wide : 6 * (i + 1) // wide])
        for row, wide in enumerate(rows)
        for i in range(wide)
    ]


def _line(axes: Axes, rows: list[Row], column: str, name: str, colour: str) -> None:
    """Draw a column; one that jumps from step to step is drawn faintly, and its running mean on top."""
    points = [(row["step"], row[column]) for row in rows if row[column] is not None]
    if not points:
        return
    steps, values = np.array(points, float).T
    values = values * (100 if column in _PERCENT else 1)
    if column in _NOISY and len(values) >= MANY:
        axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
        steps, values, window = running_mean(steps, values)
        name = f"{name}, mean of {window} steps".removeprefix(", ")
    few = len(values) <= FEW
    marker = "o" if few else ""
    axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=4, clip_on=not few, label=name)
    if column == "loss":
        log_if_steep(axes, values)


def log_if_steep(axes: Axes, values: Any) -> None:
    """Make the axis of a loss logarithmic where it falls far."""
    if steep(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")


def style(axes: Axes, *, share: bool) -> None:
    """Give axes the looks of all; those of a ``share`` in percent end just above 100 and just below 0."""
    if share:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -_ABOVE * high), min(high, 100 + _ABOVE * (100 - low)))
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _stages(axes: Axes, rows: list[Row], end: int) -> None:
    """Divide the run where its stage changes, and name those that have room for it."""
    begins = [i for i, row in enumerate(rows) if i == 0 or row["stage"] != rows[i - 1]["stage"]]
    if len(begins) < 2:
        return
    edges = [0, *(rows[i - 1]["step"] for i in begins[1:]), end]
    for index, (begin, stop) in zip(begins, pairwise(edges), strict=True):
        if begin:
            axes.axvline(begin, color=GREY, linestyle=":", linewidth=1)
        if stop - begin >= _ROOM * end:
            axes.text((begin + stop) / 2, 1.01, rows[index]["stage"], transform=axes.get_xaxis_transform(),
                      ha="center", va="bottom", fontsize=8, color=GREY, parse_math=False)  # fmt: skip


# Gates.


def _gate_bars(figure: FigureBase, gates: Gates) -> None:
    names = [f"{short(name)} (#{number})" for number, name in enumerate(gates, 1)]
    places = np.arange(1, len(gates) + 1)
    both: Any = figure.subplots(1, 2, sharey=True)
    for axes, which, title in zip(both, (0, 1), ("gates of the mean", "gates of the variance"), strict=True):
        table = _table([pair[which] for pair in gates.values()])
        left = np.zeros(len(gates))
        for name, colour, values in zip(GATES, GATE_COLOURS, np.nan_to_num(table), strict=True):
            axes.barh(places, values, left=left, height=0.75, color=colour, label=name)
            left += values
        axes.set(xlim=(0, 1), ylim=(len(gates) + 0.5, 0.5), xlabel="share")
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    both[0].set_yticks(places, names, fontsize=8, parse_math=False)
    both[0].tick_params(axis="y", length=0)
    both[1].tick_params(axis="y", length=0)
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    figure.suptitle("Gates by layer", fontsize=12, fontweight="bold")


def _gate_map(figure: FigureBase, gates: Gates) -> None:
    table = np.vstack([_table([pair[which] for pair in gates.values()]) for which in (0, 1)])
    axes: Any = figure.subplots()
    axes.set_facecolor("#DDDDDD")  # where a layer has no such gate
    scale = Normalize(0, 1)
    axes.imshow(table, aspect="auto", cmap="cividis", norm=scale, interpolation="nearest",
                extent=(0.5, len(gates) + 0.5, 5.5, -0.5))  # fmt: skip
    for edge in range(1, 6):
        axes.axhline(edge - 0.5, color="white", linewidth=4 if edge == 3 else 1)
    axes.set_yticks(range(6), [f"{which}, {name}" for which in ("mean", "variance") for name in GATES], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(20, integer=True, steps=(1, 2, 5, 10), min_n_ticks=1))
    axes.set_xlabel("# of the layer, from the first to the last")
    axes.spines[:].set_visible(False)
    figure.colorbar(ScalarMappable(scale, "cividis"), ax=axes, label="gate", pad=0.01)
    figure.suptitle("Gates by depth", fontsize=12, fontweight="bold")


def _table(gates: list[Any]) -> Any:
    """Return gates (3, layers); a layer without a batch gate has NaN there."""
    table = np.full((len(GATES), len(gates)), np.nan)
    for column, values in enumerate(gates):
        table[: len(values), column] = values
    return table


def _bars_height(gates: Gates) -> float:
    return 1.5 + _ROW * len(gates)


def short(name: str) -> str:
    """Return a name that fits, the end of a long one."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
