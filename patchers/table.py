"""Tables people read, at the command line and by `print`: what says the same is one row of them."""

import io
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from math import sqrt
from typing import TYPE_CHECKING, Any

from ..errors import spoken

if TYPE_CHECKING:
    from .plan import Decision

WIDTH = 100
"""Columns of a table that is not shown on a terminal."""

ROWS = 14
"""Rows from which a table is folded, and most that are left: with what stands around them they fit 24 lines."""

NOTE = 24
"""Longest note that stands in its row; others are footnotes."""

WORST = 3
"""Names told of the layers expected to change most."""

SUFFERS = 0.4
"""The expected change of a network's output, as a share of its root mean square, from which accuracy suffers."""

_FOLDS = {True: "yes", False: "no", None: "?"}

EXPECTED = "expected change of the layer's output, as a share of its root mean square"

Row = dict[str, Any]


def table(title: str, rows: Sequence[Row], below: Iterable[str] = ()) -> Any:
    """Return a table of the rows, leaving out columns in which nothing stands, with lines of text below it."""
    from rich.box import Box
    from rich.console import Group
    from rich.table import Table

    underlined = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    shown = Table(
        title=title, title_justify="left", title_style="bold", box=underlined, show_edge=False, padding=(0, 1, 0, 0)
    )
    columns = [key for key in (rows[0] if rows else ()) if any(row[key] not in (None, "", []) for row in rows)]
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(_text(row[column]) for column in columns))
    return Group(*([shown] if rows else [title]), *below)


def as_text(renderable: Any, width: int = WIDTH) -> str:
    """Return what is shown on a terminal as plain text of at most ``width`` columns."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def plan_table(
    title: str,
    decisions: Sequence["Decision"],
    drift: Iterable[Mapping[str, Any]] = (),
    *,
    drops: Iterable[Mapping[str, Any]] = (),
    every: bool = False,
) -> Any:
    """Return a table of a plan's decisions, beside the expected drift the measured one, where there is one.

    ``drops`` are what the lines of the way back leave unexplained. Of many sites those that say the same are one row,
    unless ``every`` asks for all of them.
    """
    measured = {found["name"]: found for found in drift}
    dropped = {found["name"]: found for found in drops}
    legend = [f"drift: {EXPECTED}"] if any(decision.drift is not None for decision in decisions) else []
    if any(decision.front for decision in decisions):
        legend.append(
            f"in front: what becomes of the layer there; {spoken('--no-equalize', 'equalize=False')} leaves it as it is"
        )
    if (together := _together(decisions)) > SUFFERS:
        legend.append(f"together: about {together:.2f}, accuracy may suffer; calibrate, or take fewer groups or sn")
    if any(decision.folds is None and decision.action == "replace" for decision in decisions):
        example = spoken("--input-shape or --example", "an example")
        legend.append(f"folds ?: it does behind a linear layer that it alone reads, which {example} may show")
    if measured:
        legend.append("measured: what it is in the patched model on images, with what the layers before it change")
    if dropped:
        legend.append("drop: share of a norm's deviation that its line does not explain; after: in the new model")
    rows = []
    for decision in decisions:
        site, found = decision.site, measured.pop(decision.site.name, {})
        row = site_row(site.name, site.aliases, site.source, site.channels, site.spatial)
        row |= {"becomes": _outcome(decision), "drift": decision.drift, "measured": found.get("rms")}
        drop = dropped.get(site.name, {})
        row |= {"drop": drop.get("before"), "after": drop.get("after")}
        folds = _FOLDS[decision.folds] if decision.action == "replace" else ""
        front = f"scaled{', new bias' if decision.adds_bias else ''}" if decision.front else ""
        rows.append({**row, "folds": folds, "in front": front, "note": decision.note})
    ends = [
        f"{name}: off by {_percent(end['rms'])} of its root mean square, {_percent(end['max'])} at most"
        for name, end in measured.items()
    ]
    figures = {name: name for name in ("drift", "measured", "drop", "after")}
    return sites_table(title, rows, figures, [*legend, *ends], every=every)


def _together(decisions: Iterable["Decision"]) -> float:
    """Return what replacements are expected to change of a network's output: each its own, independently."""
    drifts = [d.drift for d in decisions if d.action == "replace" and d.drift is not None]
    return sqrt(sum(drift**2 for drift in drifts)) if len(drifts) > 1 else 0.0


def site_row(
    name: str, aliases: Iterable[str], source: str, channels: int | None, spatial: Iterable[int] | None
) -> dict[str, Any]:
    """Return what a table of sites tells of each of them first."""
    shape = None if spatial is None else "x".join(map(str, spatial))
    return {"name": " = ".join([name, *aliases]), "type": source, "C": channels, "shape": shape}


def sites_table(
    title: str, rows: list[Row], drifts: Mapping[str, str], below: Iterable[str], *, every: bool = False
) -> Any:
    """Return a table of sites; ``drifts`` are its columns of changes, each with a word for what it tells."""
    told = rows if every else folded(rows, drifts)
    lines = [*_footnotes(told), *below]
    if len(told) < len(rows):
        lines += [f"largest {word}: {worst}" for column, word in drifts.items() if (worst := _worst(rows, column))]
        more = spoken("--all shows every layer", "plan.table(all=True) shows every layer")
        if len(types := {row["type"] for row in told}) == 1:
            more = f"all are {types.pop()}; {more}"
            told = [{key: value for key, value in row.items() if key != "type"} for row in told]
        lines.append(more)
    return table(title, told, lines)


def folded(rows: Sequence[Row], figures: Collection[str]) -> list[Row]:
    """Return rows in which those that say the same are one, and tell the range of their ``figures``.

    Up to `ROWS` stay as they are. If folding leaves more, layers of other widths, then of other maps, then with other
    notes are one row too.
    """
    if len(rows) <= ROWS:
        return [dict(row) for row in rows]
    merged: dict[tuple[Any, ...], list[Row]] = {}
    for alike in ((), ("C",), ("C", "shape"), ("C", "shape", "note")):
        merged = {}
        for row in rows:
            alone = row["name"] if " = " in row["name"] else ""
            said = (row[key] for key in row if key not in ("name", *figures, *alike))
            known = (row[key] is None for key in figures)
            merged.setdefault((alone, *said, *known), []).append(row)
        if len(merged) <= ROWS:
            break
    return [_merged(group) for group in merged.values()]


def summarised(names: Sequence[str]) -> str:
    """Return names as few patterns, a number in which they differ as ``*``, and how many: ``layer1.*.bn1 (6)``.

    Two numbers are told, as in ``layer1.{0,1}.bn1 (2)``.
    """
    if len(names) == 1:
        return names[0]
    alike: dict[str, list[list[str]]] = {}
    for name in names:
        parts = re.split(r"(\d+)", name)
        alike.setdefault("#".join(parts[::2]), []).append(parts)
    patterns = ["".join(map(_pattern, zip(*group, strict=True))) for group in alike.values()]
    return f"{', '.join([*patterns[:2], *(['...'] if len(patterns) > 2 else [])])} ({len(names)})"


def _merged(group: Sequence[Row]) -> Row:
    if len(group) == 1:
        return dict(group[0])
    row = {key: _range([each[key] for each in group]) for key in group[0]}
    notes = dict.fromkeys(part for each in group for part in str(each.get("note", "")).split("; ") if part)
    return row | {"name": summarised([each["name"] for each in group])} | ({"note": "; ".join(notes)} if notes else {})


def _range(values: Sequence[Any]) -> Any:
    """Return the value all have, or the least and the largest, or of text the first and the last."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    first, last = (min(known), max(known)) if isinstance(known[0], int | float) else (known[0], known[-1])
    return first if first == last else "-".join(dict.fromkeys([_text(first), _text(last)]))


def _pattern(parts: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(parts))
    if len(distinct) == 1:
        return distinct[0]
    return f"{{{','.join(distinct)}}}" if len(parts) == 2 else "*"


def _worst(rows: Iterable[Row], column: str) -> str:
    changing = [row for row in rows if row[column]]
    worst = sorted(changing, key=lambda row: -row[column])[:WORST]
    return ", ".join(f"{row['name']} {_text(row[column])}" for row in worst)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _outcome(decision: "Decision") -> str:
    """Return what becomes of a site, a target with what is not its default."""
    target = decision.target
    if decision.action in ("skip", "refuse") or target is None:
        return {"skip": "(left)", "refuse": "(refused)"}[decision.action]
    said = [
        f"{f.name}={value}"
        for f in fields(target)
        if f.name != "gates" and (value := getattr(target, f.name)) != f.default
    ]
    return " ".join([target.kind, *said, *(["(before)"] if decision.action == "done" else [])])


def _footnotes(rows: list[Row]) -> list[str]:
    """Move long notes to footnotes, each once, and return those."""
    parts = dict.fromkeys(part for row in rows for part in row.get("note", "").split("; ") if len(part) > NOTE)
    numbers = {part: f"[{number}]" for number, part in enumerate(parts, 1)}
    for row in rows:
        if "note" in row:
            row["note"] = "; ".join(numbers.get(part, part) for part in row["note"].split("; "))
    return [f"{number} {part}" for part, number in numbers.items()]


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.1f} %"
