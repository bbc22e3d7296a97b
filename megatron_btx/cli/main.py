"""The command line, ``btx``. Imports no torch, and each command only what it needs: asked a second
time, a finished run answers at once."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_btx import __version__
from megatron_btx.cli import centroids, compare, evaluate, routing
from megatron_btx.cli import slurm as slurm_commands
from megatron_btx.cli.slurm import open_recipe
from megatron_btx.errors import UserError
from megatron_btx.mix import command as mixing
from megatron_btx.pipeline import graph, state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.recipe import plan
from megatron_btx.recipe.schema import Recipe

EXIT_USER, EXIT_INTERRUPTED, EXIT_PIPE = 2, 130, 141

_SPACE = "free some space, or give another `run_dir:`"
_RIGHTS = "make it writable, or give another `run_dir:`"
_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _SPACE),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _RIGHTS),
}
"""What a person can do about a disk that refuses."""

_EPILOG = """examples:
  btx plan examples/demo/recipe.yaml           what it will train, and what that costs
  btx run examples/demo/recipe.yaml            do it; after an interruption, go on
  btx report examples/demo/recipe.yaml         the final table, and the page anew

exit codes: 0 done, 1 a crash, 2 a mistake in the input, 130 interrupted (run again to go on)"""

_VERIFY_EPILOG = """examples:
  btx mix --sources code=DIR math=DIR seed=DIR --out MIXTRAL
  btx verify MIXTRAL

exit codes: 0 every tensor agrees, 1 one does not, 2 it is no result of btx mix"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except UserError as error:
        sys.stderr.write(f"{_red('error')}: {error}\n")
        return EXIT_USER
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        # ... | head, or a terminal that has been closed
        if error.errno == errno.EPIPE or (error.errno == errno.EIO and error.filename is None):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_PIPE
        if error.errno not in _DISK:
            raise
        where, what = error.filename or "the disk", str(error.strerror).lower()
        sys.stderr.write(f"{_red('error')}: {UserError(str(where), what, _DISK[error.errno])}\n")
        return EXIT_USER


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="btx",
        description="Branch-Train-MiX on Megatron-Core: from one recipe to a mixture of experts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-btx {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands)
    plan.add_parser(commands)
    _add_report(commands)
    _add_stage(commands)
    mixing.add_parser(commands)
    commands.choices["mix"].description = "Mix models offline: several checkpoints in, one out."
    verify = commands.choices["verify"]
    verify.description = "Compute a result of btx mix again by plain loops, and compare."
    verify.epilog, verify.formatter_class = _VERIFY_EPILOG, argparse.RawDescriptionHelpFormatter
    compare.add_parser(commands)
    evaluate.add_parsers(commands)
    routing.add_parser(commands)
    centroids.add_parser(commands)
    slurm_commands.add_parsers(commands)
    return parser


def _add(commands: Any, name: str, help_text: str, epilog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="the recipe (YAML)")
    return parser


def _add_run(commands: Any) -> None:
    parser = _add(
        commands,
        "run",
        "run all stages of a recipe on this machine, or what is left of them",
        "examples:\n"
        "  btx run examples/demo/recipe.yaml\n"
        "  btx run recipe.yaml --dry-run              what is done and what is left\n"
        "  btx run recipe.yaml --until expert:math    this expert and what it needs\n"
        "  btx run recipe.yaml --json > outcome.json\n\n"
        "Ctrl-C lets the running stages save; the same command goes on from there.",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the stages, do nothing")
    parser.add_argument("--until", metavar="STAGE", help="stop after STAGE and what it needs")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.set_defaults(run=_run)


def _add_report(commands: Any) -> None:
    parser = _add(
        commands,
        "report",
        "print the final table of a run and write its page anew",
        "examples:\n"
        "  btx report examples/demo/recipe.yaml\n"
        "  btx report recipe.yaml --json | python -m json.tool\n\n"
        "While a run is still on its way, the page shows what there is.",
    )
    parser.add_argument("--json", action="store_true", help="print results.json instead")
    parser.set_defaults(run=_report)


def _add_stage(commands: Any) -> None:
    parser = _add(
        commands,
        "stage",
        "be one rank of one stage, for batch scripts",
        "examples:\n"
        "  srun btx stage recipe.yaml expert:math     one task a rank\n"
        "  btx stage recipe.yaml export               a stage of one rank\n\n"
        "RANK, WORLD_SIZE and LOCAL_RANK, or Slurm's names for them, say which rank it is;\n"
        "where there are several, MASTER_ADDR and MASTER_PORT, where they find each other.",
    )
    parser.add_argument("stage", metavar="STAGE", help="seed, expert:math, finetune, ...")
    parser.set_defaults(run=_stage)


def _run(options: argparse.Namespace) -> int:
    recipe, run_dir, stages = open_recipe(options.recipe)
    if options.until is not None:
        stages = graph.until(stages, options.until)
    left = state.left(run_dir, stages)
    if options.dry_run:
        _print_stages(recipe, run_dir, stages, options.json)
        return 0
    code, problem = 0, ""
    if left:
        code, problem = _run_left(options, recipe, run_dir, stages)
    elif not options.json:
        many = f"{stages[0].name} is" if len(stages) == 1 else f"all {len(stages)} stages are"
        sys.stdout.write(f"{recipe.name}: {many} done ({run_dir})\n")
    if options.json:
        _print_stages(recipe, run_dir, stages, True, code=code, problem=problem)
    elif code == 0 and any(stage.kind == "evaluate" for stage in stages):
        _print_results(run_dir)
    if left and not options.json:
        _print_sync(run_dir)
    if problem:
        sys.stderr.write(f"{_red('error')}: {problem}\n")
    return code


def _run_left(
    options: argparse.Namespace, recipe: Recipe, run_dir: Path, stages: tuple[Stage, ...]
) -> tuple[int, str]:
    """Run what is left; the exit code, and what went wrong."""
    from megatron_btx.report.run import run_left

    outcome = run_left(recipe, run_dir, stages)
    if outcome.code == EXIT_INTERRUPTED:
        again = f"btx run {shlex.quote(options.recipe)}"
        sys.stderr.write(f"stopped; run again to go on: {again}\n")
    return outcome.code, outcome.problem


def _report(options: argparse.Namespace) -> int:
    from megatron_btx.report import page

    recipe, run_dir, _ = open_recipe(options.recipe)
    again = f"btx run {shlex.quote(options.recipe)}"
    if not run_dir.is_dir():
        raise UserError(str(run_dir), "nothing has been run", again)
    results = _results(run_dir)
    if options.json and results is None:
        raise UserError(str(run_dir), "has no results yet", again)
    written = page.write(recipe, run_dir)
    if options.json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
        return 0
    _print_results(run_dir)
    if results is None:
        sys.stdout.write(f"no results yet; what there is: {written}\n")
    return 0


def _stage(options: argparse.Namespace) -> int:
    recipe, run_dir, stages = open_recipe(options.recipe)
    stage = graph.find(graph.with_mix(stages), options.stage)
    if stage.kind == "report":
        _report_stage(recipe, run_dir, stage)
        return 0
    from megatron_btx.pipeline import worker

    code = worker.run_rank(recipe, stage, run_dir)
    worker.leave(code)
    return code


def _report_stage(recipe: Recipe, run_dir: Path, stage: Stage) -> None:
    """The page as a stage: in a batch job there is no runner that would do it."""
    from megatron_btx.report import page

    state.claim(run_dir, stage)
    directory = run_dir / stage.directory
    if "BTX_ATTEMPT" not in os.environ:
        state.begin(directory, state.next_attempt(directory), 1)
    page.write(recipe, run_dir)
    state.finish(directory, stage, {})


def _results(run_dir: Path) -> dict[str, Any] | None:
    """The run's ``results.json``; ``None`` before there is any.

    Raises:
        UserError: it is damaged.
    """
    path = run_dir / "results.json"
    results = state.find_json(path)
    if path.exists() and not isinstance((results or {}).get("systems"), dict):
        again = f"remove it and {run_dir / 'evaluate'}; `btx run` makes both again"
        raise UserError(str(path), "is damaged: it holds no systems", again)
    return results


def _print_results(run_dir: Path) -> None:
    """The table of systems and where the page is, as far as they are there."""
    results = _results(run_dir)
    if results is not None:
        from megatron_btx.report import table

        table.show(results, sys.stdout)
    if (run_dir / "report.html").exists():
        sys.stdout.write(f"page: {run_dir / 'report.html'}\n")


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
    rows = []
    for stage in stages:
        record = state.done(run_dir, stage)
        stopped = (run_dir / stage.directory / "stopped.json").exists()
        standing = "done" if record else "stopped" if stopped else "left"
        spent = record.get("seconds") if record else None
        rows.append({**dataclasses.asdict(stage), "state": standing, "seconds": spent})
    if as_json:
        outcome = {
            "recipe": recipe.name,
            "run_dir": str(run_dir),
            "code": code,
            "problem": problem,
            "stages": rows,
            "results": state.find_json(run_dir / "results.json"),
        }
        sys.stdout.write(json.dumps(outcome, indent=1) + "\n")
        return
    width = max(len(stage.name) for stage in stages)
    for stage, row in zip(stages, rows, strict=True):
        size = f"{stage.world_size} x {stage.num_threads}"
        after = f"after {', '.join(stage.needs)}" if stage.needs else ""
        taken = " (taken from a checkpoint)" if stage.kind == "import" else ""
        line = f"{stage.name:<{width}}  {row['state']:<7}  {size:>7}  {after}{taken}"
        sys.stdout.write(line.rstrip() + "\n")
    sys.stdout.write(f"ranks x threads; everything goes to {run_dir}\n")


def _red(text: str) -> str:
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    return f"\x1b[1;31m{text}\x1b[0m" if colour else text
