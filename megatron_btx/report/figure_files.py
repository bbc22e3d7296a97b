"""Figures as files for a paper: standalone SVG and PNG, and their numbers as CSV.

Imports no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.evaluate.results import MEAN, Results
from megatron_btx.files import check_directory, check_file, written
from megatron_btx.report import compare_bases, comparison_figures, run_figures, table
from megatron_btx.report.compare_bases import Sweep
from megatron_btx.report.comparison import Comparison
from megatron_btx.report.comparison_figures import Cost
from megatron_btx.report.figure_svg import figure
from megatron_btx.report.routing import MEASURES, RoutingView, heatmaps
from megatron_btx.report.run_data import RunData
from megatron_btx.svg import document, element

FORMATS = ("svg", "png", "csv")
_OTHERS = (
    *(".pdf", ".jpg", ".jpeg", ".eps", ".ps", ".tif", ".tiff", ".gif", ".webp"),
    *(".txt", ".md", ".json", ".yaml", ".html", ".htm", ".tsv"),
)
ZOOM = 3
"""Pixels of a PNG to one of the SVG: about 290 dots an inch at the SVG's natural size."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture and its numbers."""

    name: str
    """``losses``: also the name of its file."""
    svg: str
    rows: Sequence[Sequence[Any]]
    """The first row names the columns."""

    def save(self, path: Path) -> None:
        """Write it in the format that the file's name ends with.

        Raises:
            UserError: PNG, and what draws it is not installed.
        """
        content = {"svg": self._svg, "png": self._png, "csv": self._csv}[path.suffix[1:]]()
        path.parent.mkdir(parents=True, exist_ok=True)
        with written(path, "wb") as file:
            file.write(content)

    def _svg(self) -> bytes:
        return self.svg.encode()

    def _png(self) -> bytes:
        check_png()
        import resvg_py

        return bytes(resvg_py.svg_to_bytes(svg_string=self.svg, zoom=ZOOM))

    def _csv(self) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.rows)
        return text.getvalue().encode()


def check_png() -> None:
    """That PNG can be drawn here.

    Raises:
        UserError: no resvg, or no font that it finds: the text would be missing.
    """
    try:
        import resvg_py
    except ImportError:
        fix = "pip install 'megatron-btx[figures]', or take svg"
        raise UserError("--format png", "resvg-py, which draws it, is not installed", fix) from None
    with_text, without = (
        resvg_py.svg_to_bytes(svg_string=document(20, 20, element("text", word, y=15)))
        for word in ("M", "")
    )
    if with_text == without:
        fix = "install one (apt-get install fonts-dejavu-core), or take svg"
        raise UserError("--format png", "no font is installed to write its labels in", fix)


def check_formats(formats: Sequence[str], out: Path | None) -> list[str]:
    """The formats that are asked for: those named, and that of a file as ``--out``.

    Raises:
        UserError: the file is of another format than is named, or cannot be written.
    """
    own = suffix(out)
    if out is not None and own is None and out.suffix.lower() in _OTHERS and not out.is_dir():
        fix = f"end its name in .{', .'.join(FORMATS)}, or give a directory"
        raise UserError(f"--out {out}", "is a file of a format that is not written", fix)
    if own is not None and set(formats) - {own}:
        what, fix = f"is a .{own} file", f"leave out --format {formats[0]}, or give a directory"
        raise UserError(f"--out {out}", what, fix)
    wanted = list(dict.fromkeys([*formats, *([own] if own else [])]))
    if "png" in wanted:
        check_png()
    if out is not None:
        check_file(out) if own else check_directory(out)
    return wanted


def suffix(out: Path | None) -> str | None:
    """Which of ``FORMATS`` a file's name says; ``None`` of a directory's."""
    return out.suffix[1:] if out is not None and out.suffix[1:] in FORMATS else None


def save_all(figures: Sequence[Figure], formats: Sequence[str], out: Path) -> list[Path]:
    """Write figures into a directory, each in each format; or the one there is as a file."""
    if suffix(out) is not None:
        (only,) = figures
        only.save(out)
        return [out]
    paths = []
    for one in figures:
        for kind in formats:
            paths.append(out / f"{one.name}.{kind}")
            one.save(paths[-1])
    return paths


def of_routing(views: Sequence[RoutingView]) -> Figure:
    """Share of the choices and mean gate of every view, domain, layer and expert."""
    drawn = {key: heatmaps(views, key) for key in MEASURES}
    groups = [
        (f"{label}: {view.title}", drawn[key][place])
        for place, view in enumerate(views)
        for key, label in MEASURES.items()
        if drawn[key][place]
    ]
    rows: list[list[Any]] = [["model", "moment", "domain", "layer", "expert", "share", "gate"]]
    for view in views:
        for domain, load in view.load.items():
            gate = view.gate.get(domain, load)
            for layer, (shares, gates) in enumerate(zip(load, gate, strict=True), 1):
                for expert, share, weight in zip(view.experts, shares, gates, strict=True):
                    rows.append([view.name, view.moment, domain, layer, expert, share, weight])
    return Figure(name="routing", svg=figure(groups), rows=rows)


def of_run(run: RunData) -> list[Figure]:
    """Losses of every stage, score against compute, routing: what there is of them."""
    found = []
    if panels := run_figures.losses(run):
        drawn = figure([("", panels)], run_figures.loss_legend(run), across=3)
        found.append(Figure(name="losses", svg=drawn, rows=_loss_rows(run)))
    if (picture := run_figures.compute(run)) is not None and run.results is not None:
        drawn, rows = figure([("", [("", picture)])]), _system_rows(run.results)
        found.append(Figure(name="compute", svg=drawn, rows=rows))
    if run.routing is not None:
        view = RoutingView(
            name=run.recipe.name,
            moment="on held-out text",
            balance_loss_coeff=run.recipe.routing.balance_loss_coeff,
            experts=run.routing.experts,
            load=run.routing.load,
            gate=run.routing.gate,
        )
        found.append(of_routing([view]))
    return found


def _system_rows(results: Results) -> list[list[Any]]:
    """The final evaluation of every system. The picture's dots: the mean at the compute after the
    seed."""
    head = ["system", "flops_after_seed", "train_flops", "train_tokens"]
    rows: list[list[Any]] = [[*head, *(f"loss_{column}" for column in results.columns)]]
    for row in table.rows(results):
        after = 0 if row.name == "seed" else row.train_flops
        losses = [row.loss.get(column) for column in results.columns]
        rows.append([row.name, after, row.train_flops, row.train_tokens, *losses])
    return rows


def _loss_rows(run: RunData) -> list[list[Any]]:
    rows: list[list[Any]] = [["stage", "step", "tokens", "curve", "nats_per_token"]]
    for stage in run.stages:
        name = stage.stage.name
        rows += [
            [name, record["step"], record.get("tokens"), "training", record["loss"]]
            for record in stage.train
        ]
        rows += [
            [name, record["step"], round(stage.tokens_at(record["step"])), domain, loss]
            for record in stage.evals
            for domain, loss in record["loss"].items()
        ]
    return rows


def of_comparison(made: Comparison) -> list[Figure]:
    """Score against each cost, and behind each picture the whole table, with what is on its
    frontier."""
    return [_against(made, cost) for cost in comparison_figures.COSTS]


def _against(made: Comparison, cost: Cost) -> Figure:
    drawn = [
        comparison_figures.point(system, cost) for system in comparison_figures.drawn(made, cost)
    ]
    best = comparison_figures.frontier(drawn)
    head = ["system", "kind", "runs"]
    for column in made.columns:
        head += [f"loss_{column}", f"spread_{column}"]
    costs = [
        *("train_tokens", "train_flops", "params_total", "params_active"),
        "inference_flops_per_token",
    ]
    rows: list[list[Any]] = [[*head, *costs, "train_seconds", "on_frontier"]]
    for system in made.systems:
        row: list[Any] = [system.name, system.system, len(system.losses)]
        for column in made.columns:
            row += [system.loss[column], system.spread.get(column)]
        row += [getattr(system.result, cost) for cost in costs]
        shown = system in comparison_figures.drawn(made, cost)
        on = shown and comparison_figures.point(system, cost) in best
        rows.append([*row, system.train_seconds, int(on)])
    picture = comparison_figures.picture(made, cost)
    return Figure(name=f"compare_{cost.key}", svg=figure([("", [("", picture)])]), rows=rows)


def of_sweep(made: Sweep) -> Figure:
    """Mean score of every system and base."""
    rows: list[list[Any]] = [["base", "system", "runs", "train_flops", "loss_mean", "spread_mean"]]
    for base, comparison in made.items():
        for system in map(comparison.named, compare_bases.names(made)):
            cost, spread = system.result.train_flops, system.spread.get(MEAN)
            losses = [system.loss[MEAN], spread]
            rows.append([base, system.name, len(system.losses), cost, *losses])
    return Figure(
        name="compare", svg=figure([("", [("", compare_bases.picture(made))])]), rows=rows
    )
