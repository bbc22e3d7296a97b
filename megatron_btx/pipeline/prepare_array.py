"""The parts of ``prepare``, where Slurm runs it as an array of jobs. Imports no torch.

prepare:begin       one job: built-in text and the tokenizer, which all others read
prepare:shards      an array of jobs, ``prepare:shards/0`` and on: each tokenizes its share
prepare             joins what they have made, and makes what is missing

To those who run it a part is a stage with the key of the whole and a directory of its own
(``prepare/shards/0/``) for its log and for how it ended. It is done for the job that it was begun
in: a part that is begun again looks at what is there, and does the rest.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from megatron_btx.errors import UserError
from megatron_btx.files import find_json
from megatron_btx.pipeline import graph, state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.recipe import slurm
from megatron_btx.recipe.schema import Recipe

WHOLE = "prepare"
BEGIN, SHARDS = "prepare:begin", "prepare:shards"
_PART = re.compile(rf"{BEGIN}|{SHARDS}/(0|[1-9]\d{{0,5}})")


def tasks(recipe: Recipe) -> int:
    """Jobs of the array; 1: there is none."""
    return slurm.resolve(recipe, WHOLE).tasks or 1


def expand(recipe: Recipe, chosen: Iterable[Stage]) -> tuple[Stage, ...]:
    """The stages as jobs: where ``prepare`` is an array, its parts before it."""
    found: list[Stage] = []
    for stage in chosen:
        if stage.name != WHOLE or tasks(recipe) == 1:
            found.append(stage)
            continue
        before: tuple[str, ...] = stage.needs
        for name in (BEGIN, SHARDS):
            found.append(dataclasses.replace(stage, name=name, needs=before))
            before = (name,)
        found.append(dataclasses.replace(stage, needs=before))
    return tuple(found)


def find(stages: Iterable[Stage], name: str, where: str = "") -> Stage:
    """The stage or part of that name.

    Raises:
        UserError: there is none.
    """
    if _PART.fullmatch(name) is None:
        return graph.find(stages, name, where)
    return dataclasses.replace(graph.find(stages, WHOLE), name=name)


def whole(stage: Stage) -> Stage:
    """The stage that a part is of; any other stage is itself."""
    return dataclasses.replace(stage, name=WHOLE) if is_part(stage) else stage


def is_part(stage: Stage) -> bool:
    """Whether it is one of those above."""
    return stage.kind == WHOLE != stage.name


def claim(run_dir: Path, stage: Stage) -> None:
    """``state.claim``; of a part, make its own directory ready for an attempt. The first part does
    it for the whole, too."""
    if not is_part(stage) or stage.name == BEGIN:
        state.claim(run_dir, whole(stage))
    if is_part(stage):
        directory = run_dir / stage.directory
        (directory / "log").mkdir(parents=True, exist_ok=True)
        (directory / "done.json").unlink(missing_ok=True)


def share(recipe: Recipe, stage: Stage, run_dir: Path) -> tuple[int, int] | None:
    """Which share of the shards a part is to do, of how many; ``None``: it is no task of the array.

    Raises:
        UserError: there is no such share, or ``prepare:begin`` is not done.
    """
    _, slash, number = stage.name.partition("/")
    if not slash:
        return None
    if int(number) >= tasks(recipe):
        what = f"is not below slurm.stages.prepare.tasks ({tasks(recipe)})"
        raise UserError(stage.name, what, "correct the number, or the recipe")
    first = dataclasses.replace(stage, name=BEGIN)
    record = find_json(run_dir / first.directory / "done.json") or {}
    if record.get("key") != stage.key:
        raise UserError(stage.name, f"needs {BEGIN} first", f"run {BEGIN}")
    return int(number), tasks(recipe)
