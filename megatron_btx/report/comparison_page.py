"""``compare.html``: the comparison's table and its picture of score against training compute."""

from __future__ import annotations

import html
import math

from megatron_btx.report.comparison import (
    HEAD,
    MEAN,
    Comparison,
    System,
    cells,
    notes,
)
from megatron_btx.report.style import series, sheet
from megatron_btx.report.svg import Axes, Dot, power_of_ten

_STYLES = {"btx": "btx-line", "dense": "dense-line", "seed": "seed-line"}
_OTHERS = ("experts", "upcycling", "btm")


def render(comparison: Comparison, title: str, tasks: str = "") -> str:
    """The page; readable without a network. ``tasks``: a plain table of scores on tasks."""
    name = html.escape(title)
    said = "".join(f'<p class="soft">{html.escape(line)}</p>' for line in notes(comparison))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name} · systems compared</title><style>{sheet()}</style></head>\n"
        f"<body><main>\n<h1>{name}: systems compared</h1>{said}"
        f"<h2>Held-out loss and cost</h2>{_table(comparison)}{_tasks(tasks)}"
        "<h2>Score against training compute</h2>"
        f'<figure class="card wide">{picture(comparison)}'
        "<figcaption>Mean held-out loss against all training compute after the seed, of the "
        "systems that are one model or one ensemble. The seed has cost nothing after itself."
        "</figcaption></figure>"
        "<footer>FLOPs are those of the matrix products of the model, three times the forward "
        "pass; recomputation is not counted.</footer>\n</main></body></html>\n"
    )


def _tasks(table: str) -> str:
    return table and f'<h2>Tasks</h2><div class="card"><pre>{html.escape(table)}</pre></div>'


def picture(comparison: Comparison) -> str:
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
            y=system.scores[MEAN].value,
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
    return 0.0 if system.system == "seed" else system.train_flops


def _style(system: System) -> str:
    if system.system in _STYLES:
        return _STYLES[system.system]
    return series(_OTHERS.index(system.system))


def _table(comparison: Comparison) -> str:
    names = ["system", *comparison.columns, *HEAD]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = ""
    for system, (first, *others) in zip(comparison.systems, cells(comparison), strict=True):
        row = f"<th>{html.escape(first)}</th>"
        for index, text in enumerate(others):
            column = names[index + 1]
            best = comparison.best.get(column) == system.name
            style = (
                ' class="score best"' if best else ' class="score"' * (column in comparison.best)
            )
            row += f"<td{style}>{html.escape(text.removesuffix('*'))}</td>"
        body += f'<tr class="{system.system}">{row}</tr>'
    return (
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
