"""``btx compare``: run what is missing of several recipes, and set them side by side."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.cli import model_flags
from megatron_btx.cli.common import add_format_flag, command, recipe_files
from megatron_btx.errors import UserError
from megatron_btx.files import check_directory, written
from megatron_btx.report import (
    compare_bases,
    comparison,
    comparison_page,
    comparison_runs,
    comparison_tables,
    figure_files,
)
from megatron_btx.report.compare_bases import Sweep
from megatron_btx.report.comparison import Comparison
from megatron_btx.report.table import tasks_table

_EPILOG = """examples:
  btx compare examples/systems                        every system of the paper, on the demo's text
  btx compare examples/systems --base my/base.yaml    the same systems on another base
  btx compare dense.yaml btx.yaml --base short.yaml --base long.yaml      mean losses per base
  btx compare dense.yaml btx.yaml --seeds 3           mean and spread over three random seeds
  btx compare examples/systems --base examples/four_domains/base.yaml --seeds 3    all systems
  btx compare ... --seeds 3 --against dense_cm        and differences from one
  btx compare examples/systems --tasks arc_easy=test.jsonl --limit 200    and their scores on tasks
  btx compare examples/systems --format svg           and the figures, as compare_*.svg
  btx compare examples/systems --dry-run              finished, shared and unfinished stages

What several recipes have in common (the seed, an expert) is trained once. After an
interruption, run it again: it continues. The table is printed, and written to --out as compare.md,
compare.json and compare.html."""


def add_parser(commands: Any) -> None:
    """Add ``compare`` to the command line."""
    parser = command(
        commands,
        "compare",
        "run several systems and compare them at matched data and compute",
        _EPILOG,
        "Run the unfinished stages of several recipes, and compare their results.",
    )
    parser.add_argument(
        "recipes", metavar="RECIPE", nargs="+", type=Path, help="recipes, or folders of them"
    )
    parser.add_argument(
        "--base",
        metavar="RECIPE",
        action="append",
        default=[],
        help="replaces the `base:` of each recipe; if repeated, mean losses per base",
    )
    parser.add_argument(
        "--seeds", metavar="N", type=int, default=1, help="number of random seeds (1)"
    )
    parser.add_argument(
        "--against",
        metavar="SYSTEM",
        action="append",
        default=[],
        help="print differences from this system (default with several seeds: from the best)",
    )
    model_flags.add_task_flags(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="output directory")
    add_format_flag(parser, "score against compute, time and inference")
    parser.add_argument("--dry-run", action="store_true", help="print the stages, run nothing")
    parser.add_argument("--json", action="store_true", help="print compare.json, no table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The command; its exit code."""
    if options.seeds < 1:
        raise UserError("--seeds", f"is {options.seeds}", "give at least 1")
    if len(options.base) > 1 and options.tasks:
        raise UserError("--tasks", "are scored under one base", "give one --base")
    model_flags.check_numbers(options)
    files = recipe_files(options.recipes)
    groups = comparison_runs.groups_of(files, options.base, options.seeds)
    runs = [one for group in groups.values() for one in group]
    out = options.out or _common([one.run_dir for one in runs])
    check_directory(out)
    formats = figure_files.check_formats(options.format, out)
    for group in groups.values():
        comparison.check_names(group, options.against)
    asked = model_flags.tasks_of(options)  # before hours of training: a file may not be there
    if options.dry_run:
        comparison_runs.print_left(runs)
        return 0
    for number, one in enumerate(runs, 1):
        code = comparison_runs.run_one(one, runs, f"{number}/{len(runs)}")
        if code != 0:
            return code
    comparison.check_text(runs)
    made = {name: comparison.compare(group) for name, group in groups.items()}
    tasks = comparison_runs.measure_tasks(runs, asked, out / "tasks")
    title = out.name or "systems"
    if len(made) > 1:
        told = _sweep(made, options.against, title)
    else:
        (only,) = made.values()
        told = _one(only, options.against, title, tasks)
    for kind, text in told.files.items():
        _write(out / f"compare.{kind}", text)
    for path in figure_files.save_all(told.figures, formats, out):
        sys.stderr.write(f"figure: {path}\n")
    page = f"page: {out / 'compare.html'}\n"
    sys.stdout.write(told.files["json"] if options.json else told.plain + page)
    return 0


@dataclass(frozen=True, slots=True)
class _Told:
    """What a comparison says."""

    plain: str
    files: dict[str, str]
    """Of ``compare.json``, ``.md`` and ``.html``, by their endings."""
    figures: list[figure_files.Figure]


def _one(made: Comparison, against: list[str], title: str, tasks: dict[str, Any]) -> _Told:
    """Of one base."""
    table = tasks_table(tasks) if tasks else ""
    fenced = f"\n```\n{table}```\n" if table else ""
    return _Told(
        plain=comparison_tables.plain(made, against) + (table and f"\n{table}"),
        files={
            "json": comparison_tables.as_json(made, against, tasks),
            "md": comparison_tables.markdown(made, against) + fenced,
            "html": comparison_page.render(made, title, against, table),
        },
        figures=figure_files.of_comparison(made),
    )


def _sweep(made: Sweep, against: list[str], title: str) -> _Told:
    """Of several bases."""
    return _Told(
        plain=compare_bases.plain(made, against),
        files={
            "json": compare_bases.as_json(made, against),
            "md": compare_bases.markdown(made, against),
            "html": compare_bases.page(made, title, against),
        },
        figures=[figure_files.of_sweep(made)],
    )


def _common(directories: Sequence[Path]) -> Path:
    """The directory that holds all of them; as they are written, if that can be said."""
    if len({directory.is_absolute() for directory in directories}) > 1:
        directories = [directory.absolute() for directory in directories]
    return Path(os.path.commonpath(directories))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as file:
        file.write(text)
