"""Pictures as inline SVG text: a line chart and a heatmap, drawn in the page's own colours.

Colours are CSS classes (style.py), so that one picture serves light and dark. Sizes are in CSS
pixels at the picture's natural width. Every mark carries its numbers in a ``<title>``.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Point = tuple[float, float]

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[Point]
    style: str
    """CSS class: colour and dashes."""
    dots: bool = False
    """Mark every point: few measurements, not a continuous record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dot:
    """One labelled point."""

    label: str
    x: float
    y: float
    style: str


@dataclass(kw_only=True, slots=True)
class Axes:
    """A rectangle with two linear axes; collects what is drawn into it."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_label: str
    y_label: str
    name: str
    """What the picture shows, for those who cannot see it."""
    width: int = 320
    height: int = 220
    left: int = 46
    right: int = 12
    """Room beside the axes, for labels of points."""
    x_format: Callable[[float], str] = lambda value: f"{value:g}"
    parts: list[str] = field(default_factory=list)

    top, bottom = 10, 38

    def x(self, value: float) -> float:
        """Pixel of a value on the x axis."""
        low, high = self.x_range
        span = self.width - self.left - self.right
        return self.left + span * (value - low) / ((high - low) or 1)

    def y(self, value: float) -> float:
        """Pixel of a value on the y axis."""
        low, high = self.y_range
        span = self.height - self.top - self.bottom
        return self.height - self.bottom - span * (value - low) / ((high - low) or 1)

    def line(self, line: Line) -> None:
        """Draw a curve; what lies outside of the axes' range, or is no number, is left out."""
        low, high = self.y_range
        inside = [(x, y) for x, y in line.points if low <= y <= high]
        kept = [(self.x(x), self.y(y)) for x, y in inside]
        if len(kept) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in kept)
            self.parts.append(f'<polyline class="curve {line.style}" points="{path}"/>')
        if line.dots or len(kept) == 1:
            for (x, y), (_, value) in zip(kept, inside, strict=True):
                told = html.escape(f"{line.label}: {value:.3f}")
                self.parts.append(
                    f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.4">'
                    f"<title>{told}</title></circle>"
                )

    def dots(self, dots: Sequence[Dot]) -> None:
        """Draw points with their labels to the right, none over another."""
        ordered = sorted(dots, key=lambda dot: self.y(dot.y))
        floor = self.height - self.bottom - 4
        heights = spread([self.y(dot.y) for dot in ordered], 16, self.top + 6, floor)
        for dot, height in zip(ordered, heights, strict=True):
            x, y, label = self.x(dot.x), self.y(dot.y), html.escape(dot.label)
            self.parts.append(
                f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{x + 12:.1f}" '
                f'y2="{height:.1f}"/>'
                f'<circle class="dot {dot.style}" cx="{x:.1f}" cy="{y:.1f}" r="5">'
                f"<title>{label}: {dot.y:.3f}</title></circle>"
                f'<text class="mark" x="{x + 14:.1f}" y="{height + 4:.1f}">{label}</text>'
            )

    def render(self) -> str:
        """The picture."""
        grid = []
        base = self.height - self.bottom
        marks = ticks(*self.y_range, 5)
        digits = max((len(f"{mark:g}".partition(".")[2]) for mark in marks), default=0)
        for tick in marks:
            y = self.y(tick)
            grid.append(
                f'<line class="grid" x1="{self.left}" x2="{self.width - self.right}" '
                f'y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">'
                f"{tick:.{digits}f}</text>"
            )
        for tick in ticks(*self.x_range, 5):
            grid.append(
                f'<text class="tick" x="{self.x(tick):.1f}" y="{base + 15}" text-anchor="middle">'
                f"{html.escape(self.x_format(tick))}</text>"
            )
        centre = (self.left + self.width - self.right) / 2
        height = (self.top + base) / 2
        grid.append(
            f'<line class="axis" x1="{self.left}" x2="{self.width - self.right}" y1="{base}" '
            f'y2="{base}"/>'
            f'<text class="label" x="{centre:.1f}" y="{self.height - 6}" text-anchor="middle">'
            f"{html.escape(self.x_label)}</text>"
            f'<text class="label" transform="translate(11 {height:.1f}) rotate(-90)" '
            f'text-anchor="middle">{html.escape(self.y_label)}</text>'
        )
        return picture(self.width, self.height, self.name, "".join([*grid, *self.parts]))


def power_of_ten(exponent: int) -> str:
    """``10¹³``, for the unit of an axis."""
    return "10" + str(exponent).translate(_RAISED)


def heatmap(
    values: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    top: float,
    name: str,
    row_label: str,
    width: int = 215,
) -> str:
    """A table of cells, the stronger the larger; the number stands in each while there is room.

    Args:
        values: ``[len(rows)][len(columns)]``.
        top: the value of the strongest colour.
        name: what it shows, for those who cannot see it.
        row_label: what a row is.
        width: natural width in pixels.
    """
    tall = 26 if len(rows) <= 12 else 14 if len(rows) <= 32 else 6
    left, head = 34, 24
    wide = (width - left - 2) / len(columns)
    parts = []
    room = int(wide / 6.2)
    for j, column in enumerate(columns):
        shown = column if len(column) <= room else column[: max(1, room - 1)] + "…"
        parts.append(
            f'<text class="tick" x="{left + wide * (j + 0.5):.1f}" y="15" text-anchor="middle">'
            f"{html.escape(shown)}<title>{html.escape(column)}</title></text>"
        )
    every = 1 if tall >= 14 else 4
    for i, row in enumerate(rows):
        y = head + tall * i
        if i % every == 0:
            parts.append(
                f'<text class="tick" x="{left - 7}" y="{y + tall / 2 + 4:.1f}" '
                f'text-anchor="end">{html.escape(row)}</text>'
            )
        for j, column in enumerate(columns):
            value = values[i][j]
            strength = min(1.0, max(0.0, value / top)) if top else 0.0
            told = html.escape(f"{row_label} {row}, {column}: {value:.3f}")
            x = left + wide * j
            parts.append(
                f'<rect class="cell" x="{x:.1f}" y="{y}" width="{wide - 1.5:.1f}" '
                f'height="{tall - 1.5}" fill-opacity="{strength:.3f}"><title>{told}</title></rect>'
            )
            if tall >= 20 and wide >= 26:
                tone = "strong" if strength > 0.55 else "weak"
                parts.append(
                    f'<text class="value {tone}" x="{x + wide / 2 - 0.75:.1f}" '
                    f'y="{y + tall / 2 + 3.5:.1f}" text-anchor="middle">{_short(value)}</text>'
                )
    height = head + tall * len(rows) + 2
    middle = head + tall * len(rows) / 2
    parts.append(
        f'<text class="label" transform="translate(11 {middle:.1f}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(row_label)}</text>'
    )
    return picture(width, height, name, "".join(parts))


def picture(width: int, height: float, name: str, content: str) -> str:
    """An ``<svg>`` that fills the width it is given."""
    return (
        f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{html.escape(name)}">'
        f"{content}</svg>"
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """At most about ``count`` round numbers from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending positions as near to ``wanted`` (ascending) as a distance of ``gap`` allows."""
    places = list(wanted)
    for _ in range(200):
        moved = False
        for i in range(len(places) - 1):
            lack = gap - (places[i + 1] - places[i])
            if lack > 1e-6:
                places[i] -= lack / 2
                places[i + 1] += lack / 2
                moved = True
        if not moved:
            break
    if places and places[-1] > high:
        places = [place - (places[-1] - high) for place in places]
    if places and places[0] < low:
        places = [place + (low - places[0]) for place in places]
    return places


def thin(points: Sequence[Point], count: int = 300) -> list[Point]:
    """A long record as ``count`` means of neighbours: the same picture in a hundredth of the
    bytes. A short one is returned as it is."""
    if len(points) <= count:
        return list(points)
    result = []
    for index in range(count):
        block = points[index * len(points) // count : (index + 1) * len(points) // count]
        xs, ys = [x for x, _ in block], [y for _, y in block]
        result.append((xs[-1], sum(ys) / len(ys)))
    return result


def _short(value: float) -> str:
    """``.07``, ``.93``, ``1.0``: two digits in a small cell."""
    text = f"{value:.2f}"
    return text[1:] if text.startswith("0") else f"{value:.1f}"
