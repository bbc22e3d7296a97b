"""``btx run``: a recipe's stages on this machine, or what is left of them. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from megatron_btx.cli.common import open_recipe, recipe_command, renamed
from megatron_btx.cli.report import print_results
from megatron_btx.errors import EXIT_INTERRUPTED, UserError, coloured
from megatron_btx.files import json_text
from megatron_btx.pipeline import graph, run_checks, state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.recipe import load
from megatron_btx.recipe.schema import Recipe


def add_parser(commands: Any) -> None:
    """Add ``run`` to the command line."""
    parser = recipe_command(
        commands,
        "run",
        "run the unfinished stages of a recipe on this machine",
        "examples:\n"
        "  btx run examples/demo/recipe.yaml\n"
        "  btx run recipe.yaml --dry-run              finished and unfinished stages\n"
        "  btx run recipe.yaml --stop-after expert:math    this expert and the stages it needs\n"
        "  btx run recipe.yaml --json > outcome.json\n\n"
        "Ctrl-C lets the running stages save; the same command then continues.",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the stages, run nothing")
    parser.add_argument("--stop-after", metavar="STAGE", help="only STAGE and the stages it needs")
    renamed(parser, "--until", "--stop-after")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run what is left; the exit code."""
    recipe, run_dir, stages = open_recipe(options.recipe)
    if options.stop_after is not None:
        stages = graph.until(stages, options.stop_after)
    left = state.left(run_dir, stages)
    if options.dry_run:
        _print_stages(recipe, run_dir, stages, options.json)
        if left and not options.json:
            _print_changes(recipe, run_dir)
        if left:  # what a run would be refused for, though it is read in seconds
            run_checks.check_inputs((recipe, run_dir, left))
            run_checks.keeps_recipe(run_dir, Path(options.recipe), recipe)
        return 0
    code, problem = 0, ""
    if left:
        code, problem = _run_recipe(options, recipe, run_dir, stages)
    elif not options.json:
        many = f"{stages[0].name} is" if len(stages) == 1 else f"all {len(stages)} stages are"
        sys.stdout.write(f"{recipe.name}: {many} done ({run_dir})\n")
    if options.json:
        _print_stages(recipe, run_dir, stages, True, code=code, problem=problem)
    elif code == 0 and any(stage.kind == "evaluate" for stage in stages):
        print_results(run_dir)
    if left and not options.json:
        _print_sync(run_dir)
    if problem:
        sys.stderr.write(f"{coloured('error')}: {problem}\n")
    return code


def _run_recipe(
    options: argparse.Namespace, recipe: Recipe, run_dir: Path, stages: tuple[Stage, ...]
) -> tuple[int, str]:
    """Run what is left; the exit code, and what went wrong."""
    from megatron_btx.pipeline.local.run_recipe import run_recipe
    from megatron_btx.report import page

    run_checks.keeps_recipe(run_dir, Path(options.recipe), recipe)
    outcome = run_recipe(recipe, run_dir, stages, page=page.write, refresh=page.REFRESH)
    if outcome.code == EXIT_INTERRUPTED:
        again = f"btx run {shlex.quote(options.recipe)}"
        sys.stderr.write(f"stopped; run again to continue: {again}\n")
    return outcome.code, outcome.problem


def _print_changes(recipe: Recipe, run_dir: Path) -> None:
    """What the recipe says otherwise than the one that the run was made for last."""
    kept = run_dir / "recipe.yaml"
    try:
        changed = load.changes(load.load_recipe(kept), recipe) if kept.is_file() else []
    except UserError:  # of another release
        return
    more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
    if changed:
        sys.stdout.write(f"changed since the last run: {'; '.join(changed[:8])}{more}\n")


def _print_sync(run_dir: Path) -> None:
    """How to upload what was logged offline, if anything was."""
    from megatron_btx.train import tracking

    if tracking.logged_offline(run_dir):
        sys.stdout.write(f"W&B logged offline; to upload: {tracking.sync_command(run_dir)}\n")


def _print_stages(
    recipe: Recipe,
    run_dir: Path,
    stages: tuple[Stage, ...],
    as_json: bool,
    *,
    code: int = 0,
    problem: str = "",
) -> None:
    rows, statuses = [], state.statuses(run_dir, stages, recipe.share)
    for stage in stages:
        standing, why = statuses[stage.name]
        record = state.done(run_dir, stage)
        spent = record.get("seconds") if record else None
        row = {**dataclasses.asdict(stage), "state": standing, "why": why, "seconds": spent}
        rows.append(row)
    if as_json:
        outcome = {
            "recipe": recipe.name,
            "run_dir": str(run_dir),
            "code": code,
            "problem": problem,
            "stages": rows,
            "results": state.find_json(run_dir / "results.json"),
        }
        sys.stdout.write(json_text(outcome, indent=1) + "\n")
        return
    width, wide = (max(len(row[key]) for row in rows) for key in ("name", "state"))
    for stage, row in zip(stages, rows, strict=True):
        size = f"{stage.world_size} x {stage.num_threads}"
        after = f"after {', '.join(stage.needs)}" if stage.needs else ""
        taken = " (taken from a checkpoint)" if stage.kind == "import" else ""
        line = f"{stage.name:<{width}}  {row['state']:<{wide}}  {size:>7}  {after}{taken}"
        sys.stdout.write(line.rstrip() + "\n" + (f"    {row['why']}\n" if row["why"] else ""))
    sys.stdout.write(f"ranks x threads; everything goes to {run_dir}\n")
