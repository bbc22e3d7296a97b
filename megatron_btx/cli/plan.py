"""``btx plan``: what every stage of a recipe will cost, before anything runs. Imports no torch, but
for ``--ranks`` and to look at checkpoints of others that a recipe takes."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_btx.cli.common import recipe_command
from megatron_btx.errors import UserError, collect_errors
from megatron_btx.pipeline import graph, import_checkpoint, run_checks
from megatron_btx.recipe import check_paths, chips, epochs, run_plan
from megatron_btx.recipe.check_paths import BadPath
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.run_plan import RunPlan
from megatron_btx.recipe.schema import Recipe

if TYPE_CHECKING:
    from megatron_btx.pipeline.rank_plan import RankPlan

_NAMED = 2
"""Further paths that a warning of several names; ``--json`` lists all."""

_EPILOG = """examples:
  btx plan examples/paper_7b/recipe.yaml
  btx plan recipe.yaml --gpu h100 --mfu 0.45 --price 2.5      GPU-hours, days and cost
  btx plan recipe.yaml --ranks      what every rank holds, reads and writes
  btx plan recipe.yaml --json | python -m json.tool"""


def add_parser(commands: Any) -> None:
    """Add ``plan`` to the command line."""
    parser = recipe_command(
        commands,
        "plan",
        "print what a recipe will cost: parameters, FLOPs, memory, disk, tokens, epochs",
        _EPILOG,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="estimate hours on these GPUs (h100, ..., or peak TFLOP/s as a number)",
    )
    parser.add_argument(
        "--mfu", metavar="SHARE", type=float, help=f"model FLOPs utilisation ({chips.MFU:g})"
    )
    parser.add_argument(
        "--price", metavar="N", type=float, help="price of a GPU-hour, to estimate the cost"
    )
    parser.add_argument(
        "--ranks",
        action="store_true",
        help="also what each rank holds, reads and writes (takes seconds)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan; exit code 0.

    Raises:
        UserErrors: the recipe is wrong, or a flag.
    """
    recipe = load_recipe(options.recipe)
    made = run_plan.plan(recipe)
    for line in run_plan.warnings(recipe):
        sys.stderr.write(f"warning: {line}\n")
    took = _estimate(options, made)
    domains = epochs.prepared(recipe)
    trained = [stage.name for stage in made.stages if stage.steps]
    read = epochs.reading(recipe, trained, domains)
    for line in chips.too_large(made, options.gpu or recipe.slurm.gpu_type):
        sys.stderr.write(f"warning: {line}\n")
    bad = check_paths.bad_paths(recipe)
    for line in (*_of_files(bad), *_of_checkpoints(recipe, bad)):
        sys.stderr.write(f"warning: {line}\n")
    by_rank = _by_rank(recipe, trained) if options.ranks else []
    if options.json:
        more: dict[str, Any] = {"reading": [asdict(one) for one in read], "domains": domains}
        more |= {"bad_paths": [asdict(one) for one in bad]}
        more |= {} if took is None else {"estimate": asdict(took)}
        more |= {"by_rank": [asdict(one) for one in by_rank]} if options.ranks else {}
        sys.stdout.write(run_plan.as_json(made, **more) + "\n")
        return 0
    if sys.stdout.isatty():
        _print_table(made)
    else:
        sys.stdout.write(run_plan.render(made) + "\n")
    if took is not None:
        sys.stdout.write(f"\n{chips.render(took)}\n")
    sys.stdout.write("\n" + epochs.render(read, domains) + "\n")
    for one in by_rank:
        sys.stdout.write(f"\n{one.render()}\n")
    for line in epochs.warnings(read):
        sys.stdout.write(f"\nwarning: {line}\n")
    return 0


def _of_files(bad: Sequence[BadPath]) -> Iterator[str]:
    """A plan needs no files, but a run will: which are not there, a warning for each kind."""
    kinds: dict[tuple[str, str], list[BadPath]] = defaultdict(list)
    for one in bad:
        kinds[one.what, one.fix].append(one)
    for (what, fix), (first, *others) in kinds.items():
        what = f"{first.path} {what}"
        if others:
            named = [f"{one.key} ({one.path})" for one in others[:_NAMED]]
            dots = ", ..." if len(others) > _NAMED else ""
            what += f"\n  and {len(others)} more like it: {', '.join(named)}{dots}"
        yield str(UserError(first.key, what, fix))


def _of_checkpoints(recipe: Recipe, bad: Sequence[BadPath]) -> Iterator[str]:
    """What a run will refuse of the checkpoints and router rows that it takes, where they are."""
    errors: list[UserError] = []
    if not any(one.key.endswith(".from") for one in bad):
        with collect_errors(errors):
            import_checkpoint.check_all(recipe, graph.outline(recipe))
    if not any(one.key == "mix.centroids" for one in bad):
        with collect_errors(errors):
            run_checks.check_centroids(recipe)
    yield from map(str, errors)


def _by_rank(recipe: Recipe, trained: list[str]) -> list[RankPlan]:
    from megatron_btx import engine

    with engine.importing():  # torch and Megatron, as a rank does
        from megatron_btx.pipeline import rank_plan

    return list(rank_plan.of_run(recipe, trained))


def _estimate(options: argparse.Namespace, made: RunPlan) -> chips.Estimate | None:
    if options.gpu is None:
        if options.mfu is not None or options.price is not None:
            raise UserError("--mfu, --price", "need a GPU", "add --gpu h100")
        return None
    mfu = chips.MFU if options.mfu is None else options.mfu
    return chips.estimate(made, options.gpu, mfu, options.price)


def _print_table(made: RunPlan) -> None:
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(title=f"Plan of {made.recipe}", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(run_plan.COLUMNS):
        title = column.replace(" ", "\n")
        table.add_column(title, justify="left" if i == 0 else "right", no_wrap=True)
    *stages, total = run_plan.rows(made)
    for row in stages:
        table.add_row(*row)
    table.add_section()
    table.add_row(*total)
    console = Console(highlight=False, markup=False)
    # A number cut off to fit a narrow terminal would be a wrong number.
    wide = Console(width=1000)
    console.width = max(console.width, Measurement.get(wide, wide.options, table).maximum)
    console.print(table)
    for line in run_plan.notes(made):
        console.print(line, soft_wrap=True)
