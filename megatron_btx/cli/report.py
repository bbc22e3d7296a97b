"""``btx report``: a run's table and page. Imports no torch."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from megatron_btx.cli.common import add_format_flag, open_recipe, recipe_command
from megatron_btx.errors import UserError
from megatron_btx.evaluate.results import Results
from megatron_btx.files import json_text


def add_parser(commands: Any) -> None:
    """Add ``report`` to the command line."""
    parser = recipe_command(
        commands,
        "report",
        "print the final table of a run and rewrite its page",
        "examples:\n"
        "  btx report examples/demo/recipe.yaml\n"
        "  btx report recipe.yaml --json | python -m json.tool\n"
        "  btx report recipe.yaml --format svg --format csv --out figures\n\n"
        "During a run, the page shows the results so far.",
    )
    parser.add_argument("--json", action="store_true", help="print results.json instead")
    add_format_flag(parser, "losses, compute and routing")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="directory of the figures (figures/ in the run's directory)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the page and print the table; the exit code."""
    from megatron_btx.report import figure_files, page, run_data

    if options.out is not None and not options.format:
        raise UserError("--out", "is the directory of figures", "choose a format: --format svg")
    if figure_files.suffix(options.out):
        raise UserError("--out", "there are several figures", "give the name of a directory")
    formats = figure_files.check_formats(options.format, options.out)
    recipe, run_dir, stages = open_recipe(options.recipe)
    again = f"btx run {shlex.quote(options.recipe)}"
    if not run_dir.is_dir():
        raise UserError(str(run_dir), "nothing has been run", again)
    results = run_data.results_of(run_dir, stages)
    none = "no results yet"
    if results is None and Results.read(run_dir) is not None:
        none += ": results.json is of another recipe, or of this one before a change"
    if options.json and results is None:
        raise UserError(str(run_dir), f"has {none}", again)
    written = page.write(recipe, run_dir, stages)
    if formats:
        found = figure_files.of_run(run_data.gather(recipe, run_dir, stages))
        paths = figure_files.save_all(found, formats, options.out or run_dir / "figures")
        sys.stderr.write("".join(f"figure: {path}\n" for path in paths))
    if options.json and results is not None:
        sys.stdout.write(json_text(results.to_json(), indent=1) + "\n")
        return 0
    if results is None:
        sys.stdout.write(f"{none}; page so far: {written}\n")
    else:
        print_results(run_dir)
    return 0


def print_results(run_dir: Path) -> None:
    """The table of systems and where the page is, as far as they are there."""
    results = Results.read(run_dir)
    if results is not None:
        from megatron_btx.report import table

        table.show(results, sys.stdout)
    if (run_dir / "report.html").exists():
        sys.stdout.write(f"page: {run_dir / 'report.html'}\n")
