"""``btx submit``, ``status``, ``logs`` and ``cancel``. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_btx.cli import several_recipes
from megatron_btx.cli.common import command, open_recipe, recipe_command, renamed
from megatron_btx.errors import UserError, UserErrors
from megatron_btx.files import json_text
from megatron_btx.pipeline import graph, prepare_array, state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.recipe.messages import number


def add_parser(commands: Any) -> None:
    """The four commands."""
    parser = command(
        commands,
        "submit",
        "submit the unfinished stages of a recipe as Slurm jobs",
        "examples:\n"
        "  btx submit recipe.yaml --dry-run            the graph and the resources of each job\n"
        "  btx submit recipe.yaml --dry-run --scripts  also every script\n"
        "  btx submit recipe.yaml\n"
        "  btx submit recipe.yaml --stop-after mix     all stages before the finetuning\n"
        "  btx submit recipe.yaml --from finetune      it and the stages that need it\n"
        "  btx submit recipe.yaml --only expert:math\n"
        "  btx submit dense.yaml btm.yaml btx.yaml     one graph; shared stages once; comparison\n"
        "  btx submit examples/systems --base my/base.yaml --seeds 3\n\n"
        "Finished stages are not submitted again; stopped ones continue. See docs/slurm.md.",
    )
    several_recipes.add_flags(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the jobs, submit nothing")
    parser.add_argument(
        "--scripts", action="store_true", help="with --dry-run: every script as it would be sent"
    )
    parser.add_argument(
        "--only", metavar="STAGE", action="append", default=[], help="only STAGE (may be repeated)"
    )
    parser.add_argument(
        "--from", metavar="STAGE", dest="first", help="STAGE and the stages that need it"
    )
    parser.add_argument("--stop-after", metavar="STAGE", help="STAGE and the stages it needs")
    renamed(parser, "--until", "--stop-after")
    parser.add_argument(
        "--no-probe",
        action="store_true",
        help="do not check on a node that it sees the run's directory",
    )
    parser.set_defaults(run=submit)

    parser = command(
        commands,
        "status",
        "show the state of every stage of a run, on this machine or under Slurm",
        "examples:\n"
        "  btx status recipe.yaml\n"
        "  btx status recipe.yaml --watch\n"
        "  btx status recipe.yaml --numbers            MFU, step times, memory, goodput, experts\n"
        "  btx status recipe.yaml --json | python -m json.tool\n"
        "  btx status dense.yaml btm.yaml btx.yaml    all, and their comparison",
    )
    several_recipes.add_flags(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, with all numbers")
    parser.add_argument(
        "--numbers", action="store_true", help="also speed, goodput and expert load"
    )
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        type=_seconds,
        nargs="?",
        const=10.0,
        help="repeat until no job is left",
    )
    parser.set_defaults(run=status)

    parser = recipe_command(
        commands,
        "logs",
        "print what a stage's latest attempt has logged: warnings and errors",
        "examples:\n  btx logs recipe.yaml finetune\n  btx logs recipe.yaml expert:math -f",
    )
    parser.add_argument("stage", metavar="STAGE", help="seed, expert:math, finetune, ...")
    parser.add_argument("-f", "--follow", action="store_true", help="follow the log as it grows")
    parser.set_defaults(run=logs)

    parser = command(
        commands,
        "cancel",
        "cancel the jobs of a recipe; `btx submit` continues from their checkpoints",
        "examples:\n"
        "  btx cancel recipe.yaml\n"
        "  btx cancel recipe.yaml --only dense\n"
        "  btx cancel examples/systems --seeds 3       of all of them, and their comparison's",
    )
    several_recipes.add_flags(parser)
    parser.add_argument(
        "--only", metavar="STAGE", action="append", default=[], help="only STAGE (may be repeated)"
    )
    parser.set_defaults(run=cancel)


def submit(options: argparse.Namespace) -> int:
    """``btx submit``."""
    from megatron_btx.pipeline import run_checks
    from megatron_btx.pipeline.slurm import submit

    if options.scripts and not options.dry_run:
        raise UserError("--scripts", "needs --dry-run", "give both")
    if not several_recipes.alone(options):
        return several_recipes.submit(options)
    recipe, run_dir, stages = open_recipe(options.recipe)
    chosen = select_stages(stages, only=options.only, first=options.first, last=options.stop_after)
    left = state.left(run_dir, chosen)
    check_needs(run_dir, stages, left)
    chosen = prepare_array.expand(recipe, left)
    if options.dry_run and chosen:
        sys.stdout.write(submit.dry_run(recipe, run_dir, chosen, whole=options.scripts))
        run_checks.check_inputs((recipe, run_dir, left))
        run_checks.keeps_recipe(run_dir, Path(options.recipe), recipe)
        return 0
    if not chosen:
        sys.stdout.write(f"{recipe.name}: all selected stages are done ({run_dir})\n")
        return 0
    run_checks.keeps_recipe(run_dir, Path(options.recipe), recipe)
    run_checks.check(recipe, run_dir, left, gpus=None)
    jobs, notes = submit.submit(recipe, run_dir, chosen, probe=not options.no_probe)
    for note in [*run_checks.warnings(recipe), *notes]:
        sys.stderr.write(f"warning: {note}\n")
    for stage, line in zip(chosen, submit.graph_lines(recipe, chosen), strict=True):
        sys.stdout.write(f"{jobs[stage.name]:>8}  {line}\n")
    sys.stdout.write(
        f"everything goes to {run_dir}; see btx status {shlex.quote(options.recipe)}\n"
    )
    return 0


def _seconds(text: str) -> float:
    value = number(text)
    if value is None or not 0.1 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0.1 and 86400 seconds")
    return float(value)


def status(options: argparse.Namespace) -> int:
    """``btx status``."""
    if not options.watch:
        text, _ = _standing(options)
        sys.stdout.write(text)
        return 0
    from megatron_btx.pipeline.slurm import commands

    left = True
    while left:
        try:
            text, left = _standing(options)
        except commands.Silent as error:  # the controller is being restarted, or busy
            text = f"{error}\n"
        sys.stdout.write(f"\x1b[H\x1b[J{text}" if sys.stdout.isatty() else text)
        sys.stdout.flush()
        if left:
            time.sleep(options.watch)
    return 0


def _standing(options: argparse.Namespace) -> tuple[str, bool]:
    """Where every stage stands, as text, and whether any is still in the queue."""
    from megatron_btx.pipeline.slurm import status, status_table

    if not several_recipes.alone(options):
        return several_recipes.standing(options)
    recipe, run_dir, stages = open_recipe(options.recipe)
    rows = status.rows(run_dir.absolute(), stages, recipe.share)
    if options.json:
        text = json_text([dataclasses.asdict(row) for row in rows], indent=1) + "\n"
    else:
        text = status_table.table(rows)
        if options.numbers and (more := status_table.numbers_text(rows)):
            text += f"\n{more}"
    return text, any(row.active for row in rows)


def logs(options: argparse.Namespace) -> int:
    """``btx logs``."""
    from megatron_btx.pipeline.slurm import run_jobs

    _, run_dir, stages = open_recipe(options.recipe)
    run_dir = run_dir.absolute()
    stage = prepare_array.find(stages, options.stage)
    path = run_jobs.log_file(run_dir, stage)
    if path is None and not options.follow:
        return _no_log(run_dir, stage, options.recipe)
    offset = 0
    while True:
        latest = run_jobs.log_file(run_dir, stage)
        if latest != path:  # another attempt has begun
            path, offset = latest, 0
        if path is not None:
            with path.open("rb") as file:
                file.seek(offset)
                new = file.read()
            offset += len(new)
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()
        if not options.follow or _over(run_dir, stage):
            return 0
        time.sleep(0.5)


def _no_log(run_dir: Path, stage: Stage, recipe: str) -> int:
    """Say why there is nothing to print; exit code 0 where a stage had nothing to say.

    Raises:
        UserError: it has not been begun.
    """
    directory = run_dir / stage.directory
    if state.done(run_dir, stage) is None and not (directory / "attempts.jsonl").exists():
        raise UserError(stage.name, "has no log yet", f"btx status {shlex.quote(recipe)}")
    losses = directory / "metrics.jsonl"
    more = f"; its losses, step by step, are in {losses}" if losses.exists() else ""
    said = "has printed nothing: a log holds warnings and errors alone"
    sys.stderr.write(f"{stage.name} {said}{more}\n")
    return 0


def _over(run_dir: Path, stage: Stage) -> bool:
    """Whether nothing more will be logged."""
    from megatron_btx.pipeline.slurm import commands, status

    if state.done(run_dir, stage) is not None:
        return True
    try:
        (row,) = status.rows(run_dir, (stage,))
    except commands.Silent:  # it is being restarted, or busy: the ranks go on, and so does this
        return False
    return not row.active


def cancel(options: argparse.Namespace) -> int:
    """``btx cancel``."""
    from megatron_btx.pipeline.slurm import commands, run_jobs

    for path in options.recipes[1:]:
        if not path.exists():
            raise UserError(str(path), "is no recipe", f"to select a stage: `--only {path}`")
    if not several_recipes.alone(options):
        return several_recipes.cancel(options)
    recipe, run_dir, stages = open_recipe(options.recipe)
    chosen = {graph.find(stages, name).name for name in options.only}
    found = [
        job
        for job in run_jobs.active(run_dir.absolute(), stages)
        if not chosen or any(f"{job.stage}:".startswith(f"{name}:") for name in chosen)
    ]
    commands.cancel(job.number for job in found)
    for job in found:
        sys.stdout.write(f"cancelled {job.number} ({job.stage})\n")
    if not found:
        sys.stdout.write(f"{recipe.name}: no jobs in the queue\n")
    return 0


def select_stages(
    stages: tuple[Stage, ...],
    *,
    only: Iterable[str] = (),
    first: str | None = None,
    last: str | None = None,
) -> tuple[Stage, ...]:
    """The stages that are selected.

    Args:
        only: these, by stage (``expert:math``) or kind (``expert``).
        first: this one and all that wait for it.
        last: this one and all that it waits for.

    Raises:
        UserError: there is no such stage.
    """
    chosen = {stage.name for stage in stages}
    only = tuple(only)
    if only:
        chosen = {name for asked in only for name in _named(stages, asked, "--only")}
    if first is not None:
        behind = _named(stages, first, "--from")
        for stage in stages:
            if behind.intersection(stage.needs):
                behind.add(stage.name)
        chosen &= behind
    if last is not None:
        before: set[str] = set()
        for name in _named(stages, last, "--stop-after"):
            before |= {stage.name for stage in graph.until(stages, name)}
        chosen &= before
    return tuple(stage for stage in stages if stage.name in chosen)


def _named(stages: tuple[Stage, ...], asked: str, option: str) -> set[str]:
    names = {stage.name for stage in stages if asked in (stage.name, stage.name.partition(":")[0])}
    if not names:
        raise graph.no_stage(asked, [stage.name for stage in stages], option)
    return names


def check_needs(run_dir: Path, stages: tuple[Stage, ...], chosen: tuple[Stage, ...]) -> None:
    """That everything a chosen stage waits for is done or chosen too.

    Raises:
        UserErrors: all that is missing.
    """
    coming = {stage.name for stage in chosen}
    errors = []
    for stage in chosen:
        needs = state.missing(run_dir, graph.read_by(stage, stages))
        missing = [need.name for need in needs if need.name not in coming]
        if missing:
            what = f"needs {', '.join(missing)}, which is neither done nor selected"
            errors.append(UserError(stage.name, what, "select those as well"))
    if errors:
        raise UserErrors(errors)
