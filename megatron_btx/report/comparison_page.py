"""``compare.html``: the comparison's tables, and its pictures of score against cost."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_btx.report import comparison_figures, html
from megatron_btx.report.comparison import Comparison
from megatron_btx.report.comparison_tables import HEAD, Table, cells, notes, tables
from megatron_btx.report.html import Cell

_CAPTION = (
    "Mean held-out loss against {}, of the systems that are one model or one ensemble. The stair "
    "is the frontier: the best that can be had for at most so much; on it names are bold. Bars are "
    "the standard deviation over the random seeds."
)


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
        head=plain_cells(names),
        rows=rows,
        below=[html_table(table) for table in tables(comparison, against)],
        tasks=tasks,
        pictures=[
            (cost.title, _CAPTION.format(cost.said), comparison_figures.picture(comparison, cost))
            for cost in comparison_figures.COSTS
        ],
    )


def html_table(table: Table) -> tuple[str, list[Cell], list[tuple[str, list[Cell]]]]:
    """What the template takes: what it shows, the head, the rows."""
    what, (head, *rows) = table
    return what, plain_cells(head), [("", plain_cells(row)) for row in rows]


def plain_cells(row: Sequence[str]) -> list[Cell]:
    """Without a style."""
    return [(text, "") for text in row]
