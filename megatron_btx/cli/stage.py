"""``btx stage``: run one rank of one stage, for batch scripts. Imports no torch until it runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from megatron_btx.cli.common import recipe_command
from megatron_btx.pipeline import state, worker
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.local import reaper
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Recipe


def add_parser(commands: Any) -> None:
    """Add ``stage`` to the command line."""
    parser = recipe_command(
        commands,
        "stage",
        "run one rank of one stage, for batch scripts",
        "examples:\n"
        "  srun btx stage recipe.yaml expert:math     one task per rank\n"
        "  btx stage recipe.yaml export               a stage of one rank\n\n"
        "The rank is given by RANK, WORLD_SIZE and LOCAL_RANK, or Slurm's variables for them;\n"
        "with several ranks, MASTER_ADDR and MASTER_PORT are needed too.",
    )
    parser.add_argument("stage", metavar="STAGE", help="seed, expert:math, finetune, ...")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run this process's rank; its exit code."""
    recipe = load_recipe(options.recipe)
    run_dir = Path(recipe.run_dir)
    stage = worker.stage_of(recipe, options.stage, run_dir)
    if stage.kind == "report":
        _report_stage(recipe, run_dir, stage)
        return 0
    reaper.end_at_once()
    code = worker.run_rank(recipe, stage, run_dir)
    worker.leave(code)
    return code


def _report_stage(recipe: Recipe, run_dir: Path, stage: Stage) -> None:
    """Write the page as a stage of its own: in a batch job no runner does it."""
    from megatron_btx.report import page

    state.claim(run_dir, stage)
    directory = run_dir / stage.directory
    if "BTX_ATTEMPT" not in os.environ:
        state.begin(directory, state.next_attempt(directory), 1)
    page.write(recipe, run_dir)
    state.finish(directory, stage, {})
