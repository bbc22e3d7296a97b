"""``btx submit``, ``status`` and ``cancel`` of several recipes: one graph that ends in their
comparison. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_btx.cli.common import recipe_files
from megatron_btx.errors import UserError
from megatron_btx.files import check_directory, json_text
from megatron_btx.pipeline import graph, run_checks, state
from megatron_btx.report import comparison_runs


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The recipes, and what makes several of them: as ``btx compare`` takes them."""
    parser.add_argument(
        "recipes", metavar="RECIPE", nargs="+", type=Path, help="the recipe (YAML), or a run's "
        "directory; or several, or folders of them: shared stages run once, and the last job "
        "compares them"
    )  # fmt: skip
    parser.add_argument("--base", metavar="RECIPE", help="replaces the `base:` of each recipe")
    parser.add_argument(
        "--seeds", metavar="N", type=int, default=1, help="number of random seeds (1)"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="output directory of the comparison of several recipes",
    )


def alone(options: argparse.Namespace) -> bool:
    """Whether one recipe is meant, as it is; it is ``options.recipe`` then. Folders among
    ``options.recipes`` become the recipes in them.

    Raises:
        UserError: flags do not go together, or a folder has no recipe in it.
    """
    if options.seeds < 1:
        raise UserError("--seeds", f"is {options.seeds}", "give at least 1")
    options.recipes = recipe_files(options.recipes)
    if len(options.recipes) == 1 and options.seeds == 1 and options.base is None:
        if options.out is not None:
            raise UserError("--out", "is for a comparison", "give several recipes")
        options.recipe = str(options.recipes[0])
        return True
    return False


def _members(options: argparse.Namespace) -> tuple[list[Any], Path]:
    """The runs, arranged, and where their comparison goes."""
    from megatron_btx.pipeline.slurm import several_recipes

    members = []
    for run in comparison_runs.runs_of(options.recipes, options.base, options.seeds):
        run_dir = run.run_dir.absolute()
        stages = graph.of_run(run.recipe, run_dir)
        members.append(several_recipes.Member(recipe=run.recipe, run_dir=run_dir, stages=stages))
    out = options.out or Path(os.path.commonpath([member.run_dir for member in members]))
    if out.absolute() in {member.run_dir for member in members}:  # of one recipe alone
        out = out.with_name(f"{out.name}-compare")
    return several_recipes.arrange(members), out.absolute()


def submit(options: argparse.Namespace) -> int:
    """``btx submit`` of several."""
    from megatron_btx.pipeline import prepare_array
    from megatron_btx.pipeline.slurm import several_recipes
    from megatron_btx.pipeline.slurm import submit as one

    if options.only or options.first or options.stop_after:
        flag = "--only, --from and --stop-after"
        raise UserError(flag, "selects stages of one recipe", "submit one recipe only")
    members, out = _members(options)
    check_directory(out)
    if options.dry_run:
        for member in members:
            sys.stdout.write(_lines(member, one.graph_lines(member.recipe, member.chosen), {}))
        sys.stdout.write(f"{several_recipes.COMPARE} of {len(members)} runs, in {out}\n")
        if options.scripts:
            sys.stdout.write(f"\n{several_recipes.compare_script(members, out)}")
        run_checks.check_inputs(
            *((one.recipe, one.run_dir, state.left(one.run_dir, one.stages)) for one in members)
        )
        return 0
    for member in members:
        run_checks.keeps_recipe(member.run_dir, Path(os.devnull), member.recipe)
        if left := state.left(member.run_dir, member.stages):
            run_checks.check(member.recipe, member.run_dir, left, gpus=None)
    numbers, last, notes = several_recipes.submit_all(members, out, probe=not options.no_probe)
    for note in dict.fromkeys(notes):
        sys.stderr.write(f"warning: {note}\n")
    for member in members:
        chosen = prepare_array.expand(member.recipe, member.chosen)
        lines = one.graph_lines(member.recipe, chosen)
        jobs = numbers[member.run_dir]
        named = [f"{jobs[s.name]:>8}  {line}" for s, line in zip(chosen, lines, strict=True)]
        sys.stdout.write(_lines(member, named, jobs))
    sys.stdout.write(f"{last:>8}  {several_recipes.COMPARE} of {len(members)} runs, in {out}\n")
    return 0


def _lines(member: Any, own: Sequence[str], jobs: dict[str, str]) -> str:
    """What is submitted for one recipe, and what of it another one makes."""
    lines = [f"{member.recipe.name}, in {member.run_dir}", *own]
    for name, maker in member.taken.items():
        lines.append(f"{jobs.get(name, ''):>8}  {name}  that of {maker.name}".rstrip())
    return "\n".join([*lines, "", ""])


def standing(options: argparse.Namespace) -> tuple[str, bool]:
    """Where every stage of every recipe stands, and the comparison, as text; and whether any of
    their jobs is still in the queue."""
    from megatron_btx.pipeline.slurm import several_recipes, status, status_table

    members, out = _members(options)
    rows = {one.run_dir: status.rows(one.run_dir, one.stages, one.recipe.share) for one in members}
    last = several_recipes.row(out)
    texts = []
    content: dict[str, Any] = {}
    for member in members:
        found = rows[member.run_dir]
        content[str(member.run_dir)] = [dataclasses.asdict(row) for row in found]
        texts.append(f"{member.recipe.name}, in {member.run_dir}\n{status_table.table(found)}")
        if options.numbers and (more := status_table.numbers_text(found)):
            texts[-1] += f"\n{more}"
    if last is not None:
        content[str(out)] = [dataclasses.asdict(last)]
        texts.append(f"comparison, in {out}\n{status_table.table([last])}")
    active = any(row.active for found in rows.values() for row in found)
    active = active or (last is not None and last.active)
    return (json_text(content, indent=1) + "\n" if options.json else "\n".join(texts)), active


def cancel(options: argparse.Namespace) -> int:
    """``btx cancel`` of several."""
    from megatron_btx.pipeline.slurm import commands, run_jobs, several_recipes

    if options.only:
        raise UserError("--only", "selects stages of one recipe", "cancel one recipe's only")
    members, out = _members(options)
    last = several_recipes.row(out)
    found = {} if last is None or not last.active else {last.job: last.stage}
    for member in members:
        for job in run_jobs.active(member.run_dir, member.stages):
            found.setdefault(job.number, f"{job.stage} of {member.recipe.name}")
    commands.cancel(found)
    for number, what in found.items():
        sys.stdout.write(f"cancelled {number} ({what})\n")
    if not found:
        sys.stdout.write("no jobs in the queue\n")
    return 0
