"""``btx plan``: what every stage of a recipe will cost, before anything runs. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from megatron_btx.cli.common import recipe_command
from megatron_btx.recipe import plan, reading
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.plan import Plan

_EPILOG = """examples:
  btx plan examples/paper_7b/recipe.yaml
  btx plan recipe.yaml --json | python -m json.tool"""


def add_parser(commands: Any) -> None:
    """Add ``plan`` to the command line."""
    parser = recipe_command(
        commands,
        "plan",
        "what a recipe will cost and read: parameters, FLOPs, memory, disk, tokens, epochs",
        _EPILOG,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan; exit code 0.

    Raises:
        UserErrors: the recipe is wrong.
    """
    recipe = load_recipe(options.recipe)
    made = plan.plan(recipe)
    domains = reading.prepared(recipe)
    trained = [stage.name for stage in made.stages if stage.steps]
    read = reading.reading(recipe, trained, domains)
    if options.json:
        more = {"reading": [asdict(one) for one in read], "domains": domains}
        sys.stdout.write(plan.as_json(made, **more) + "\n")
        return 0
    if sys.stdout.isatty():
        _print_table(made)
    else:
        sys.stdout.write(plan.render(made) + "\n")
    sys.stdout.write("\n" + reading.render(read, domains) + "\n")
    for line in reading.warnings(read):
        sys.stdout.write(f"\nwarning: {line}\n")
    return 0


def _print_table(made: Plan) -> None:
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(title=f"Plan of {made.recipe}", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(plan.COLUMNS):
        title = column.replace(" ", "\n")
        table.add_column(title, justify="left" if i == 0 else "right", no_wrap=True)
    *stages, total = plan.rows(made)
    for row in stages:
        table.add_row(*row)
    table.add_section()
    table.add_row(*total)
    console = Console(highlight=False, markup=False)
    # A number cut off to fit a narrow terminal would be a wrong number.
    wide = Console(width=1000)
    console.width = max(console.width, Measurement.get(wide, wide.options, table).maximum)
    console.print(table)
    for line in plan.notes(made):
        console.print(line, soft_wrap=True)
