"""One comparison under several bases side by side: how the mean loss goes with what they differ in,
the length of the finetuning for example. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from megatron_btx.evaluate.results import MEAN
from megatron_btx.report import comparison_figures, html
from megatron_btx.report.comparison import Comparison
from megatron_btx.report.comparison_page import html_table
from megatron_btx.report.comparison_tables import (
    Table,
    content,
    json_lines,
    markdown_table,
    plain_table,
    shown,
    signed,
    told_flops,
)
from megatron_btx.report.figure_svg import Line

Sweep = Mapping[str, Comparison]
"""By the base's name, in the order given."""

_CAPTION = (
    "Mean held-out loss against all training FLOPs after the seed: a point a base, bars the "
    "standard deviation over the random seeds."
)


def names(sweep: Sweep) -> list[str]:
    """The systems that every base has; single experts and the seed are left out."""
    first, *others = sweep.values()
    return [
        system.name
        for system in first.systems
        if system.system not in ("seed", "experts")
        and all(system.name in {one.name for one in other.systems} for other in others)
    ]


def tables(sweep: Sweep, against: Sequence[str]) -> list[Table]:
    """Mean losses, differences (from each of ``against``; of several random seeds from the first
    base's best, where none is given) and training FLOPs, each by system and base."""
    head = ["system", *sweep]
    first = next(iter(sweep.values()))
    several = max(len(system.losses) for system in first.systems) > 1
    losses = [
        [name, *(shown(made, made.named(name), MEAN) for made in sweep.values())]
        for name in names(sweep)
    ]
    found = [(f"{_HELD_OUT}{_SPREAD if several else ''}", [head, *losses])]
    for other in list(against) or [first.best[MEAN]] * several:
        rows = [
            [name, *(_difference(made, name, other) for made in sweep.values())]
            for name in names(sweep)
            if name != other
        ]
        what = f"The mean loss less {other}'s under the same random seed, negative is better"
        found.append((what, [head, *rows]))
    flops = [
        [name, *(told_flops(made.named(name).result.train_flops) for made in sweep.values())]
        for name in names(sweep)
    ]
    return [*found, ("Training FLOPs after the seed", [head, *flops])]


_HELD_OUT = "Mean held-out loss in nats per token, lower is better; * the best of its base"
_SPREAD = (
    "; mean ± sample standard deviation over the random seeds, ~ the 95% interval of a paired "
    "difference holds 0 (Student's t)"
)


def _difference(made: Comparison, name: str, other: str) -> str:
    found = made.difference(made.named(name), made.named(other), MEAN)
    return "-" if found is None else signed(found)


def markdown(sweep: Sweep, against: Sequence[str]) -> str:
    """The tables."""
    each = tables(sweep, against)
    return "\n".join(f"{what}:\n\n{markdown_table(rows)}" for what, rows in each)


def plain(sweep: Sweep, against: Sequence[str]) -> str:
    """The tables as aligned text."""
    each = tables(sweep, against)
    return "\n".join(f"{what}:\n{plain_table(rows)}" for what, rows in each)


def as_json(sweep: Sweep, against: Sequence[str]) -> str:
    """Of each base what a comparison's ``compare.json`` holds."""
    bases: dict[str, Any] = {name: content(made, against) for name, made in sweep.items()}
    return json_lines({"bases": bases}, 4) + "\n"


def page(sweep: Sweep, title: str, against: Sequence[str]) -> str:
    """``compare.html``; readable without a network."""
    (what, head, rows), *below = map(html_table, tables(sweep, against))
    return html.render(
        "compare.html",
        name=title,
        notes=[f"{what}."],
        head=head,
        rows=rows,
        below=below,
        tasks="",
        pictures=[("Score against training compute", _CAPTION, picture(sweep))],
    )


def picture(sweep: Sweep) -> Markup:
    """A line a system, over the bases by rising training FLOPs, as SVG."""
    cost = comparison_figures.COSTS[0]
    lines = []
    for number, name in enumerate(names(sweep)):
        every_base = (made.named(name) for made in sweep.values())
        known = [system for system in every_base if cost.of(system) is not None]
        dots = [comparison_figures.dot(system, cost, html.series(number)) for system in known]
        lines.append(sorted(dots, key=lambda dot: dot.x))
    every = [dot for dots in lines for dot in dots]
    least = min((dot.x for dot in every), default=0.0)
    axes = comparison_figures.axes(cost, every, least, "Mean held-out loss, system by system")
    for dots in filter(None, lines):
        points = [(dot.x, dot.y) for dot in dots]
        axes.line(Line(label=dots[0].label, points=points, style=dots[0].style))
    unlabelled = [replace(dot, label="") for dots in lines for dot in dots[:-1]]
    axes.dots([*unlabelled, *(dot for dots in lines for dot in dots[-1:])])
    return axes.render()
