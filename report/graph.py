"""What each norm of a model became in the graph of an ONNX file, and a drawing of it.

The file's nodes say whose they are: they are called after the layer and their part in its formula, and so are the
weights that a norm was folded into (see `normswap.export.forms` and `normswap.export.fold`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

FOLDED = ".folded_weight"
"""What the name of weights ends in that a norm was folded into."""

IN, OUT = "x", "y"

MOST = 100
"""Operators that are drawn; none of our norms has half as many."""


@dataclass(frozen=True)
class Node:
    """An operator: what it computes of the formula, and where its inputs come from: other nodes by number, or `IN`."""

    op: str
    part: str
    inputs: tuple[int | str, ...]


@dataclass(frozen=True)
class Written:
    """What norms became that are written alike: nodes, or nothing but other weights of a node ``into``."""

    names: tuple[str, ...]
    nodes: tuple[Node, ...]
    into: str = ""


def written(graph: Any, norms: Sequence[str]) -> list[Written]:
    """Return what became of the norms of those names in an ONNX graph, those written alike together, in its order.

    One that is called more than once is told of its first call.
    """
    owned: dict[str, dict[str, list[Any]]] = {}
    into: dict[str, str] = {}
    known = set(norms)
    for node in graph.node:
        if call := next(_calls(node.name, known), None):
            owned.setdefault(call.partition("#")[0], {}).setdefault(call, []).append(node)
        for name in node.input:
            if name.endswith(FOLDED) and (site := name.removesuffix(FOLDED)).partition("#")[0] in known:
                into.setdefault(site.partition("#")[0], node.op_type)
    found: dict[tuple[tuple[Node, ...], str], list[str]] = {}
    for name in norms:
        call, own = next(iter(owned.get(name, {}).items()), ("", []))
        nodes = tuple(_nodes(own, call))
        if nodes or name in into:
            found.setdefault((nodes, "" if nodes else into[name]), []).append(name)
    return [Written(tuple(names), nodes, op) for (nodes, op), names in found.items()]


def _calls(name: str, norms: set[str]) -> Iterator[str]:
    """Yield the calls of norms, ``bn1`` or ``bn1#2``, that a node of that name can be of, the longest first."""
    while "/" in name:
        name = name.rpartition("/")[0]
        if name.partition("#")[0] in norms:
            yield name


def _nodes(nodes: Sequence[Any], call: str) -> Iterator[Node]:
    made = {name: number for number, node in enumerate(nodes) for name in node.output}
    constant = {name for node in nodes for name in node.input if name.startswith(f"{call}/") and name not in made}
    for node in nodes:
        inputs = [made.get(name, IN) for name in node.input if name and name not in constant]
        yield Node(node.op_type, node.name.removeprefix(f"{call}/"), tuple(dict.fromkeys(inputs)))


# The drawing: nodes in rows by how far they are from the input, each above those that take what it gives.

_ROW, _BOX, _GAP, _LANE = 58, 38, 8, 14
_NARROW, _WIDE, _WIDTH = 78, 168, 344
_SHRUNK = 440
"""Width from which a drawing is not made smaller to fit a phone, but scrolls."""
_LETTER = 0.62
"""Width of a letter, as a share of its height."""


@dataclass
class _Place:
    """A node's place in its row, or that of a line that passes through; ``number`` is None for the latter."""

    number: int | str | None
    above: list["_Place"]
    x: float = 0.0


def drawing(title: str, nodes: Sequence[Node]) -> Markup:
    """Return a drawing of nodes from the input at the top to the output at the bottom; of too many, how many."""
    if len(nodes) > MOST:
        return escape(f"{len(nodes)} operators, too many to be drawn")
    rows = _rows(nodes)
    width = max([_WIDTH, *(_least(row) for row in rows)])
    for row in rows:
        boxes, lanes = _counted(row)
        free = width - lanes * _LANE - _GAP * (len(row) - 1)
        wide = min(_WIDE, free / max(boxes, 1))
        x = (width - wide * boxes - lanes * _LANE - _GAP * (len(row) - 1)) / 2
        for place in row:
            own = _LANE if place.number is None else wide
            place.x = x + own / 2
            x += own + _GAP
    height = _ROW * len(rows) - (_ROW - _BOX) + 2
    lines, shapes = [], []
    for level, row in enumerate(rows):
        boxes, lanes = _counted(row)
        wide = min(_WIDE, (width - lanes * _LANE - _GAP * (len(row) - 1)) / max(boxes, 1))
        top = 1 + level * _ROW
        for place in row:
            for above in place.above:
                lines.append(_edge(above, place, top))
            if place.number is None:
                lines.append(
                    Markup('<line class="edge" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(
                        place.x, top, top + _BOX
                    )
                )
            else:
                shapes.append(_box(place, nodes, wide, top))
    told = f"{len(nodes)} operator{'' if len(nodes) == 1 else 's'}: {', '.join(node.op for node in nodes)}"
    classes = "wide" if width > _SHRUNK else ""
    return Markup(
        '<svg class="{}" viewBox="0 0 {:.0f} {}" width="{:.0f}" height="{}" role="img"><title>{}</title>'
        "<desc>{}</desc>{}{}</svg>"
    ).format(classes, width, height, width, height, title, told, Markup("").join(lines), Markup("").join(shapes))


def _rows(nodes: Sequence[Node]) -> list[list[_Place]]:
    """Return the places by row: the input, the nodes, the output, and the lines that pass rows in between."""
    levels: dict[int | str, int] = {IN: 0}
    for number, node in enumerate(nodes):
        levels[number] = 1 + max((levels[source] for source in node.inputs if source in levels), default=0)
    last = max(levels.values()) + 1
    levels[OUT] = last
    rows: list[list[_Place]] = [[] for _ in range(last + 1)]
    at: dict[int | str, _Place] = {IN: _Place(IN, [])}
    rows[0].append(at[IN])
    lanes: dict[tuple[int | str, int], _Place] = {}
    read = {source for node in nodes for source in node.inputs}
    ends = [number for number, _ in enumerate(nodes) if number not in read]
    wanted: list[tuple[int | str, tuple[int | str, ...]]] = [*((n, node.inputs) for n, node in enumerate(nodes))]
    wanted.append((OUT, tuple(ends)))
    for level in range(1, last + 1):
        for reader, inputs in wanted:
            if levels[reader] == level:
                above = [lanes.get((source, level - 1), at[source]) for source in inputs if source in at]
                rows[level].append(at.setdefault(reader, _Place(reader, above)))
        for source, place in list(at.items()):
            reach = max((levels[reader] for reader, inputs in wanted if source in inputs), default=0)
            if levels[source] < level < reach:
                lane = _Place(None, [lanes.get((source, level - 1), place)])
                lanes[source, level] = lane
                rows[level].append(lane)
        order = {id(place): index for index, place in enumerate(rows[level - 1])}
        rows[level].sort(key=lambda place: _mean([order[id(above)] for above in place.above if id(above) in order]))
    return rows


def _mean(numbers: Sequence[int]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def _counted(row: Sequence[_Place]) -> tuple[int, int]:
    lanes = sum(place.number is None for place in row)
    return len(row) - lanes, lanes


def _least(row: Sequence[_Place]) -> float:
    boxes, lanes = _counted(row)
    return boxes * _NARROW + lanes * _LANE + _GAP * (len(row) - 1)


def _edge(above: _Place, place: _Place, top: int) -> Markup:
    start = top - (_ROW - _BOX)
    tip = "" if place.number is None else _tip(place.x, top)
    end = top if place.number is None else top - 5
    middle = (start + end) / 2
    return Markup('<path class="edge" d="M{:.1f} {} C{:.1f} {} {:.1f} {} {:.1f} {}"/>{}').format(
        above.x, start, above.x, middle, place.x, middle, place.x, end, tip
    )


def _tip(x: float, y: int) -> Markup:
    return Markup('<path class="tip" d="M{:.1f} {} l-3.5 -6 h7 z"/>').format(x, y)


def _box(place: _Place, nodes: Sequence[Node], wide: float, top: int) -> Markup:
    if not isinstance(place.number, int):
        label = "input x" if place.number == IN else "output y"
        return Markup(
            '<rect class="box" x="{:.1f}" y="{}" width="72" height="24" rx="12"/>'
            '<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>'
        ).format(place.x - 36, top + (14 if place.number == IN else 0), place.x,
                 top + (14 if place.number == IN else 0) + 16, label)  # fmt: skip
    node = nodes[place.number]
    parts = [
        Markup('<rect class="box" x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="5"/>').format(
            place.x - wide / 2, top, wide, _BOX
        )
    ]
    one = not node.part
    for text, y, kind in ((node.op, 23 if one else 16, ""), (node.part, 30, "faint")):
        if text:
            size = min(11.0, (wide - 6) / (_LETTER * len(text)))
            shown = text if size >= 8 else f"{text[: int((wide - 6) / (_LETTER * 8)) - 1]}…"
            parts.append(
                Markup('<text class="{}" x="{:.1f}" y="{}" text-anchor="middle" style="font-size:{:.1f}px">{}</text>')
                .format(kind, place.x, top + y, max(size, 8.0), shown)
            )  # fmt: skip
    return Markup("").join(parts)
