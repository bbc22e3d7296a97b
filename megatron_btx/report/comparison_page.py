"""``compare.html``: the comparison's table and its picture of score against training compute."""

from __future__ import annotations

import math

from markupsafe import Markup

from megatron_btx.evaluate.results import MEAN
from megatron_btx.report import html
from megatron_btx.report.comparison import HEAD, Comparison, System, cells, notes
from megatron_btx.report.html import Cell, series
from megatron_btx.report.plots import Axes, Dot, power_of_ten

_STYLES = {"btx": "btx-line", "dense": "dense-line", "seed": "seed-line"}
_OTHERS = ("experts", "upcycling", "btm")


def render(comparison: Comparison, title: str, tasks: str = "") -> str:
    """The page; readable without a network. ``tasks``: a plain table of scores on tasks."""
    names = ["system", *comparison.columns, *HEAD]
    rows = []
    for system, cells_of_it in zip(comparison.systems, cells(comparison), strict=True):
        row: list[Cell] = []
        for column, text in zip(names, cells_of_it, strict=True):
            style = "score" if column in comparison.best else ""
            if comparison.best.get(column) == system.name:
                style = "score best"
            row.append((text.removesuffix("*"), style))
        rows.append((system.system, row))
    return html.render(
        "compare.html",
        name=title,
        notes=notes(comparison),
        head=[(name, "") for name in names],
        rows=rows,
        tasks=tasks,
        picture=picture(comparison),
    )


def picture(comparison: Comparison) -> Markup:
    """Mean score of every system against its training FLOPs, as SVG. Single experts are left out:
    they are parts of a system; so are systems whose FLOPs are not known."""
    systems = [system for system in comparison.systems if system.system != "experts"]
    spent = [(system, _spent(system)) for system in systems]
    known = [(system, flops) for system, flops in spent if flops is not None]
    top = max((flops for _, flops in known), default=0.0)
    exponent = math.floor(math.log10(top)) if top else 0
    dots = [
        Dot(
            label=system.name,
            x=flops / 10.0**exponent,
            y=system.result.loss[MEAN],
            style=_style(system),
        )
        for system, flops in known
    ]
    values = [dot.y for dot in dots]
    margin = 0.06 * (max(values) - min(values) or 1.0)
    axes = Axes(
        x_range=(0, max(dot.x for dot in dots) or 1),
        y_range=(min(values) - margin, max(values) + margin),
        x_label=f"training compute after the seed ({power_of_ten(exponent)} FLOPs)",
        y_label="mean held-out loss (nats/token)",
        name="Mean held-out loss of every system against its training compute",
        width=620,
        height=max(340, 60 + 22 * len(dots)),
        left=60,
        right=150,
    )
    axes.dots(dots)
    return axes.render()


def _spent(system: System) -> float | None:
    return 0.0 if system.system == "seed" else system.result.train_flops


def _style(system: System) -> str:
    if system.system in _STYLES:
        return _STYLES[system.system]
    return series(_OTHERS.index(system.system))
