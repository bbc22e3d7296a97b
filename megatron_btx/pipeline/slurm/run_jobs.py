"""Which of Slurm's jobs are a run's, whoever submitted them and however. Imports no torch.

* ``btx submit`` lets a job work in the run's directory (``WorkDir``), under the name of its stage.
* A script of ``slurm/`` that was submitted by hand is known by its command: the script's name tells
  the kind of stage, its first argument is a recipe of this run.
* What else was begun inside a job (``salloc`` and ``srun``, a script under another name) has left
  its number in the stage's ``attempts.jsonl``.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.files import find_json
from megatron_btx.pipeline import state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.slurm import commands, script
from megatron_btx.pipeline.slurm.commands import SlurmJob
from megatron_btx.recipe import slurm
from megatron_btx.recipe.load import load_recipe
from megatron_btx.train.goodput import read_attempts

_SCRIPT = re.compile(rf"(?:.*/)?({'|'.join(slurm.KINDS)})\.sbatch (.+)")


def submitted(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The latest job of every stage: ``{stage: {"job", "key", "submission", "after"}}``."""
    content = find_json(run_dir / "slurm" / "jobs.json") or {}
    return {name: record for name, record in content.items() if isinstance(record, dict)}


def begun(directory: Path) -> dict[str, Any]:
    """What the latest attempt at a stage has noted of the job that it was in; empty if of none."""
    attempts = read_attempts(directory)
    return attempts[-1] if attempts and attempts[-1].get("job") else {}


def this_job() -> dict[str, Any]:
    """What an attempt notes of the job that it is in; empty outside of Slurm."""
    number = os.environ.get("SLURM_JOB_ID")
    if number is None:
        return {}
    names = {"job_name": "SLURM_JOB_NAME", "user": "SLURM_JOB_USER", "nodes": "SLURM_JOB_NODELIST"}
    noted = {key: os.environ.get(name) for key, name in names.items()}
    return {"job": number, **noted}


def active(run_dir: Path, stages: Iterable[Stage], *, of_all: bool = False) -> list[SlurmJob]:
    """Queued and running jobs of a run, each with its stage.

    Args:
        run_dir: absolute.
        stages: of the run.
        of_all: look at the jobs of every user of the cluster, who may be many; by default of this
            one and of those who have worked on the run before.

    Raises:
        Silent: the controller does not answer.
    """
    places = {stage.name: run_dir / stage.directory for stage in stages}
    noted = {name: begun(place) for name, place in places.items() if not _ended(place)}
    workers = {str(line["user"]) for line in noted.values() if line.get("user")}
    users = {commands.me()} | workers | set(_submitters(run_dir))
    found = []
    for job in commands.queued(() if of_all else users):
        stage = _stage(job, run_dir, noted)
        if stage is not None:
            found.append(dataclasses.replace(job, stage=stage))
    return found


def _ended(directory: Path) -> bool:
    """Whether the latest attempt is over: its job may be an interactive allocation."""
    return any((directory / f"{how}.json").exists() for how in ("done", "stopped", "error"))


def _stage(job: SlurmJob, run_dir: Path, noted: dict[str, dict[str, Any]]) -> str | None:
    """The stage of this run that a job is for."""
    if "@" in job.name and job.directory and _same(job.directory, run_dir):
        return job.name.partition("@")[0]
    by_hand = _SCRIPT.fullmatch(job.command)
    if by_hand is not None:
        recipe, stage = by_hand[2], by_hand[1]
        if stage == "expert":
            recipe, _, domain = recipe.rpartition(" ")
            stage = f"expert:{domain}"
        theirs = _run_dir(Path(job.directory, recipe))
        if theirs is not None and _same(theirs, run_dir):
            return stage
    return next((name for name, line in noted.items() if same(job, line)), None)


def _same(one: str | Path, other: Path) -> bool:
    """Whether two paths are one directory: a home is often a link to another file system."""
    return str(one) == str(other) or os.path.realpath(one) == os.path.realpath(other)


def same(job: SlurmJob, line: dict[str, Any]) -> bool:
    """Whether an attempt was made in this job: Slurm counts anew after a loss of its state."""
    noted = (line.get("job"), line.get("job_name"), line.get("user"))
    return noted == (job.number, job.name, job.user)


def is_of(job: SlurmJob, run_dir: Path, stage: Stage, noted: dict[str, Any]) -> bool:
    """Whether a job that was found by its number is a stage's."""
    return not job.directory or _stage(job, run_dir, {stage.name: noted}) == stage.name


def _run_dir(recipe: Path) -> Path | None:
    """Where the run of a recipe is, as a job that starts in ``recipe``'s directory sees it."""
    try:
        return Path(load_recipe(recipe).run_dir).absolute()
    except (UserError, OSError):
        return None


def refuse_active(run_dir: Path, stages: Iterable[Stage]) -> None:
    """That no job of this run is in the queue.

    Raises:
        UserError: some are, or some of another user's may be.
        Silent: the controller does not answer.
    """
    found = active(run_dir, stages, of_all=True)
    me = commands.me()
    if found:
        names = ", ".join(
            f"{job.number} ({job.stage}{'' if job.user == me else f', of {job.user}'})"
            for job in found
        )
        others = sorted({job.user for job in found} - {me})
        who = f"; they are {' and '.join(others)}'s to end" if others else ""
        raise UserError(
            str(run_dir),
            f"jobs of this run are in the queue: {names}",
            f"wait for them (`btx status`), or end them first (`btx cancel`){who}",
        )
    hidden = _hidden(run_dir, me)
    if hidden:
        raise UserError(
            str(run_dir),
            f"was submitted by {hidden}, and this cluster hides other users' jobs (PrivateData)",
            f"ask {hidden} whether any is left; if none is, remove {run_dir}/slurm/jobs.json",
        )


def _hidden(run_dir: Path, me: str) -> str:
    """The user whose jobs of this run may be in the queue without our seeing them, or nothing."""
    others = [user for user in _submitters(run_dir) if user != me]
    return others[0] if others and os.geteuid() != 0 and commands.jobs_private() else ""


def _submitters(run_dir: Path) -> list[str]:
    """Who has submitted the latest jobs of a run's stages."""
    submissions = {str(record.get("submission")) for record in submitted(run_dir).values()}
    records = [
        find_json(run_dir / "slurm" / name / "environment.json") for name in sorted(submissions)
    ]
    return [str(record["user"]) for record in records if record and record.get("user")]


def log_file(run_dir: Path, stage: Stage) -> Path | None:
    """Where to read what a stage says: its latest attempt, or the batch script's own words where
    these are newer or no rank has started; ``None`` before either has said anything."""
    attempt = state.next_attempt(run_dir / stage.directory) - 1
    ranks = state.log_file(run_dir / stage.directory, attempt)
    known = submitted(run_dir)
    record = known.get(stage.name) or known.get(stage.name.partition("/")[0])
    batch = (
        run_dir / "slurm" / str((record or {}).get("submission")) / f"{script.stem(stage.name)}.out"
    )
    found = [path for path in (ranks, batch) if path.is_file() and path.stat().st_size]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
