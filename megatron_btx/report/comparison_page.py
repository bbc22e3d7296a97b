"""``compare.html``: the comparison's tables, and its pictures of score against cost."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_btx.report import comparison_charts, html
from megatron_btx.report.comparison import Comparison
from megatron_btx.report.comparison_tables import HEAD, cells, notes, tables
from megatron_btx.report.html import Cell


def render(comparison: Comparison, title: str, against: Sequence[str] = (), tasks: str = "") -> str:
    """The page; readable without a network.

    Args:
        comparison: what it shows.
        title: its heading.
        against: the systems from which differences are told (``comparison_tables.tables``).
        tasks: a plain table of scores on tasks.
    """
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
        head=_plain(names),
        rows=rows,
        below=[
            (what, _plain(head), [("", _plain(row)) for row in rest])
            for what, (head, *rest) in tables(comparison, against)
        ],
        tasks=tasks,
        pictures=[
            (cost.title, cost.said, comparison_charts.picture(comparison, cost))
            for cost in comparison_charts.COSTS
        ],
    )


def _plain(row: Sequence[str]) -> list[Cell]:
    return [(text, "") for text in row]
