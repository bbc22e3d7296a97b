"""Figures as SVG: line charts and heatmaps, in the colours of the report page.

Colours are CSS classes (html.py), so that one picture serves light and dark mode. Sizes are in CSS
pixels at the picture's natural width. Every mark carries its numbers in a ``<title>``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from megatron_btx.report import figure_labels
from megatron_btx.report.html import picture_sheet
from megatron_btx.svg import document, element

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
    """May be empty."""
    x: float
    y: float
    style: str
    spread: float = 0.0
    """Of ``y``, drawn as a bar to both sides."""
    strong: bool = True
    """Whether the label is bold."""


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
    x_unit: float = 1.0
    """Values of x are told as multiples of it."""
    parts: list[Markup] = field(default_factory=list)

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
            self.parts.append(element("polyline", class_=f"curve {line.style}", points=path))
        if line.dots or len(kept) == 1:
            for (x, y), (_, value) in zip(kept, inside, strict=True):
                told = element("title", f"{line.label}: {value:.3f}")
                style = f"dot {line.style}"
                self.parts.append(element("circle", told, class_=style, cx=x, cy=y, r="2.4"))

    def dots(self, dots: Sequence[Dot]) -> None:
        """Draw points with their labels beside them, none over another or over a point."""
        ordered = sorted(dots, key=lambda dot: (not dot.strong, self.y(dot.y)))
        places = [(self.x(dot.x), self.y(dot.y)) for dot in ordered]
        room = figure_labels.Box(self.left, self.top, self.width, self.height - self.bottom)
        boxes = figure_labels.place(places, [dot.label for dot in ordered], room)
        for dot, (x, y), box in zip(ordered, places, boxes, strict=True):
            if not dot.label:
                continue
            middle = (box.top + box.bottom) / 2
            near, anchor = (box.left, "start") if box.left > x else (box.right, "end")
            style = "mark" if dot.strong else "mark light"
            self.parts += [
                element("line", class_="leader", x1=x, y1=y, x2=near, y2=middle),
                text(dot.label, style, near, middle + 4, anchor),
            ]
        for dot, (x, y) in zip(ordered, places, strict=True):
            told = element("title", f"{dot.label}: {dot.y:.3f}")
            self.parts.append(element("circle", told, class_=f"dot {dot.style}", cx=x, cy=y, r=5))
            if dot.spread:
                ends = {"y1": self.y(dot.y - dot.spread), "y2": self.y(dot.y + dot.spread)}
                self.parts.append(element("line", class_="bar", x1=x, x2=x, **ends))

    def render(self) -> Markup:
        """The picture."""
        right, base = self.width - self.right, self.height - self.bottom
        marks = ticks(*self.y_range, 5)
        digits = max((len(f"{mark:g}".partition(".")[2]) for mark in marks), default=0)
        grid = []
        for tick in marks:
            y, shown = self.y(tick), f"{tick:.{digits}f}"
            grid += [
                element("line", class_="grid", x1=self.left, x2=right, y1=y, y2=y),
                text(shown, "tick", self.left - 6, y + 4, "end"),
            ]
        low, high = (value / self.x_unit for value in self.x_range)
        for tick in ticks(low, high, 5):
            x = self.x(tick * self.x_unit)
            grid.append(text(self.x_format(tick), "tick", x, base + 15, "middle"))
        centre, height = (self.left + right) / 2, (self.top + base) / 2
        grid += [
            element("line", class_="axis", x1=self.left, x2=right, y1=base, y2=base),
            text(self.x_label, "label", centre, self.height - 6, "middle"),
            sideways(self.y_label, height),
        ]
        return picture(self.width, self.height, self.name, *grid, *self.parts)


def text(shown: str, style: str, x: float, y: float, anchor: str | None = None) -> Markup:
    """A label, at its baseline."""
    return element("text", shown, class_=style, x=x, y=y, text_anchor=anchor)


def sideways(shown: str, middle: float) -> Markup:
    """The label of a y axis."""
    turned = f"translate(11 {middle:.1f}) rotate(-90)"
    return element("text", shown, class_="label", transform=turned, text_anchor="middle")


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
) -> Markup:
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
    room = int(wide / 6.2)
    parts = []
    for j, column in enumerate(columns):
        shown = column if len(column) <= room else column[: max(1, room - 1)] + "…"
        told = element("title", column)
        x = left + wide * (j + 0.5)
        parts.append(element("text", shown, told, class_="tick", x=x, y=15, text_anchor="middle"))
    every = 1 if tall >= 14 else 4
    for i, row in enumerate(rows):
        y = head + tall * i
        if i % every == 0:
            parts.append(text(row, "tick", left - 7, y + tall / 2 + 4, "end"))
        for j, column in enumerate(columns):
            strength = min(1.0, max(0.0, values[i][j] / top)) if top else 0.0
            told = element("title", f"{row_label} {row}, {column}: {values[i][j]:.3f}")
            parts += _cell(values[i][j], strength, told, (left + wide * j, y), (wide, tall))
    height = head + tall * len(rows) + 2
    parts.append(sideways(row_label, head + tall * len(rows) / 2))
    return picture(width, height, name, *parts)


def _cell(
    value: float, strength: float, told: Markup, at: Point, size: tuple[float, float]
) -> list[Markup]:
    """A rectangle, and its number while there is room."""
    (x, y), (wide, tall) = at, size
    opacity = f"{strength:.3f}"
    box = {"x": x, "y": y, "width": wide - 1.5, "height": tall - 1.5}
    cell = [element("rect", told, class_="cell", fill_opacity=opacity, **box)]
    if tall >= 20 and wide >= 26:
        tone = "value strong" if strength > 0.55 else "value weak"
        cell.append(text(_short(value), tone, x + wide / 2 - 0.75, y + tall / 2 + 3.5, "middle"))
    return cell


def picture(width: float, height: float, name: str, *content: Markup) -> Markup:
    """An ``<svg>`` that fills the width it is given."""
    box = f"0 0 {width:g} {height:g}"
    return element("svg", *content, viewBox=box, role="img", aria_label=name)


Group = tuple[str, Sequence[tuple[str, Markup]]]
"""A heading (may be empty), and pictures with their titles."""


def figure(groups: Sequence[Group], legend: Sequence[tuple[str, str]] = (), across: int = 4) -> str:
    """Pictures side by side as one SVG file, whole in itself.

    Args:
        groups: the pictures, of each group in rows of ``across``.
        legend: of lines, (label, style); drawn above them.
        across: pictures in a row.
    """
    sizes = [_size(picture) for _, panels in groups for _, picture in panels]
    wide, tall = (max(side) for side in zip(*sizes, strict=True))
    columns = min(across, max(len(panels) for _, panels in groups))
    gap, head = 16, 18
    longest = max(len(heading) for heading, _ in groups)
    width = max(gap + columns * (wide + gap), 2 * gap + 7.2 * longest)
    parts, y = _legend(legend, gap, width)
    for heading, panels in groups:
        if heading:
            parts.append(text(heading, "mark", gap, y + 14))
            y += 26
        for index, (title, picture) in enumerate(panels):
            x = gap + index % columns * (wide + gap)
            at = y + index // columns * (tall + head + gap)
            parts += [text(title, "tick", x, at + 10), _placed(picture, x, at + head)]
        y += -(-len(panels) // columns) * (tall + head + gap)
    paper = element("rect", class_="paper", width="100%", height="100%")
    return document(width, y, paper, *parts, style=picture_sheet()) + "\n"


def _size(picture: Markup) -> tuple[float, float]:
    found = re.match(r'<svg viewBox="0 0 ([\d.]+) ([\d.]+)"', picture)
    assert found is not None
    return float(found[1]), float(found[2])


def _placed(picture: Markup, x: float, y: float) -> Markup:
    """A picture in another one, at its natural size."""
    width, height = _size(picture)
    place = f'<svg x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return Markup(place) + Markup(str(picture).removeprefix("<svg"))


def _legend(
    rows: Sequence[tuple[str, str]], left: float, width: float
) -> tuple[list[Markup], float]:
    """Its marks, and where they end."""
    parts: list[Markup] = []
    x, y = left, 22
    for label, style in rows:
        needed = 44 + 6.4 * len(label)
        if x + needed > width and x > left:
            x, y = left, y + 18
        points = f"{x:.1f},{y - 4:.1f} {x + 26:.1f},{y - 4:.1f}"
        parts.append(element("polyline", class_=f"curve {style}", points=points))
        parts.append(text(label, "tick", x + 32, y))
        x += needed
    return parts, y + 14 if rows else 12


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
