"""Curves and bars as SVG, drawn in the colours of the page, light or dark, and small enough to be read on a phone."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from markupsafe import Markup

WIDTH, HEIGHT = 360, 210
"""Of a chart, in the units of its texts, which are 11 high."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 8, 34
_SPAN = 0.02
"""Least span of an axis, as a share of what is on it: less would only show roundings."""
_MOST = 400
"""Points of a line; of more, some are left out."""
_FEW = 25
"""Points, up to which each is marked."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line of points (x, y), x rising; a ``thin`` one is what another is the mean of, a ``dashed`` one a level."""

    name: str
    points: Points
    colour: str
    thin: bool = False
    dashed: bool = False


def curves(title: str, lines: Sequence[Line], *, logarithmic: bool = False, below: str = "step") -> Markup:
    """Return lines over a common x, whose axis is called ``below``."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    across = _Axis(min(xs), max(xs), _LEFT, WIDTH - _RIGHT)
    up = _Axis(min(ys), max(ys), HEIGHT - _BOTTOM, _TOP, logarithmic=logarithmic, room=0.05)
    parts = [_head(WIDTH, HEIGHT, title, "; ".join(map(_told, lines)))]
    for tick in up.ticks(5):
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                _LEFT, WIDTH - _RIGHT, up(tick), up(tick)
            )
        )
        parts.append(_text(_LEFT - 6, up(tick) + 4, short(tick), "end"))
    for tick in across.ticks(4):
        parts.append(_text(across(tick), HEIGHT - _BOTTOM + 16, short(tick), "middle"))
    parts.append(
        Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            _LEFT, WIDTH - _RIGHT, HEIGHT - _BOTTOM, HEIGHT - _BOTTOM
        )
    )
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 4, below, "middle"))
    for line in lines:
        shown = thinned(line.points)
        places = [f"{across(x):.1f},{up(y):.1f}" for x, y in shown]
        kind = "thin" if line.thin else "line dashed" if line.dashed else "line"
        parts.append(Markup('<polyline class="{} {}" points="{}"/>').format(kind, line.colour, " ".join(places)))
        if len(shown) <= _FEW and not line.dashed:
            parts += [
                Markup('<circle class="fill {}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(line.colour, across(x), up(y))
                for x, y in shown
            ]
    return Markup("").join([*parts, Markup("</svg>")])


def bar(share: float, text: str, colour: str = "blue") -> Markup:
    """Return a text with a bar of that share of the whole width, which says the same."""
    return Markup(
        '{} <svg class="bar {}" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="10"/><rect class="fill" width="{:.2f}" height="10"/></svg>'
    ).format(text, colour, 100 * min(max(share, 0.0), 1.0))


def shares(values: Sequence[tuple[str, str, float]]) -> Markup:
    """Return shares (name, colour, value) of one whole as one bar, with their numbers below."""
    told = ", ".join(f"{name} {value:.2f}" for name, _, value in values)
    parts, left = [], 0.0
    for _, colour, value in values:
        parts.append(
            Markup('<rect class="fill {}" x="{:.2f}" width="{:.2f}" height="10"/>').format(
                colour, 100 * left, 100 * value
            )
        )
        left += value
    return Markup(
        '<svg class="bar shares" viewBox="0 0 100 10" preserveAspectRatio="none" role="img"><title>{}</title>{}</svg>'
        "<small>{}</small>"
    ).format(told, Markup("").join(parts), " · ".join(f"{value:.2f}" for _, _, value in values))


def thinned(points: Points) -> list[tuple[float, float]]:
    """Return at most `_MOST` of the points, evenly, with the last."""
    step = ceil(len(points) / _MOST)
    return [*points[:-1:step], points[-1]] if step > 1 else list(points)


def short(value: float) -> str:
    """Return a number in few characters: 0.05, 1200, 120k."""
    size = abs(value)
    for least, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if least <= size < 1e12:
            unit = {"G": 1e9, "M": 1e6, "k": 1e3}[name]
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class _Axis:
    """From values to places on the page; ``room`` is the share of it that is left at both ends."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False
    room: float = 0.0

    def __call__(self, value: float) -> float:
        low, high = self._ends()
        return self.start + (self._scaled(value) - low) / (high - low) * (self.end - self.start)

    def _ends(self) -> tuple[float, float]:
        low, high = self._scaled(self.low), self._scaled(self.high)
        least = max(abs(low), abs(high)) * _SPAN or 1.0
        spare = max((high - low) * self.room, (least - (high - low)) / 2)
        return low - spare, high + spare

    def _scaled(self, value: float) -> float:
        return log10(value) if self.logarithmic else value

    def ticks(self, most: int) -> list[float]:
        """Return up to about ``most`` round values on the axis."""
        low, high = self._ends()
        if self.logarithmic:
            powers = range(floor(low) - 1, ceil(high) + 1)
            for steps in ((1, 2, 5), (1,)):
                found = [step * 10.0**power for power in powers for step in steps]
                if len(found := [tick for tick in found if low <= log10(tick) <= high]) <= most + 2:
                    return found
            return found[:: ceil(len(found) / most)]
        span = (high - low) / most
        power = 10.0 ** floor(log10(span))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span * 0.999)
        ticks = [number * step for number in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]
        return [0.0 if abs(tick) < step * 1e-9 else tick for tick in ticks]


def drawable(value: float | None) -> bool:
    """Return whether a value can stand in a chart: it is there, finite, and no nonsense of a file's."""
    return value is not None and isfinite(value) and abs(value) < 1e30


def _head(width: int, height: int, title: str, told: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" width="{}" height="{}" role="img"><title>{}</title><desc>{}</desc>').format(
        width, height, width, height, title, told
    )


def _told(line: Line) -> str:
    """Return in words where a line begins and ends."""
    (first, start), (last, end) = line.points[0], line.points[-1]
    if line.dashed:
        return f"{line.name}: {short(start)}"
    return f"{line.name}: from {short(start)} at {short(first)} to {short(end)} at {short(last)}"


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text class="faint" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)
