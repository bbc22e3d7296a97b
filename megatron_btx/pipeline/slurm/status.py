"""Where every stage of a submitted run stands: from Slurm, and from what it has written. Needs no
accounting database; a job that Slurm has forgotten is known by its files. Imports no torch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.files import find_json
from megatron_btx.pipeline import locks, prepare_array, state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.local.progress import StageProgress
from megatron_btx.pipeline.slurm import commands, run_jobs
from megatron_btx.pipeline.slurm.cause import cause, why_waiting
from megatron_btx.pipeline.slurm.status_table import StageStatus
from megatron_btx.recipe.messages import clock
from megatron_btx.train.goodput import read_attempts
from megatron_btx.train.summary import slow_in_words


def rows(run_dir: Path, stages: tuple[Stage, ...], share: Sequence[str] = ()) -> list[StageStatus]:
    """A row a stage; ``run_dir`` is absolute. ``share`` is the recipe's.

    Raises:
        Silent: the controller does not answer.
    """
    known = run_jobs.submitted(run_dir)
    # Those whose submission was killed before it could write them down, and those that were
    # submitted by hand, are in the queue.
    queued: dict[str, str] = {}
    try:
        queued = {job.stage: job.number for job in run_jobs.active(run_dir, stages)}
    except UserError:  # a run of this machine needs no Slurm to be looked at
        if known or any("job" in run_jobs.begun(run_dir / stage.directory) for stage in stages):
            raise
    found = []
    standing = state.statuses(run_dir, stages, share)
    for stage in stages:
        found += _parts(run_dir, stage, known)
        noted = run_jobs.begun(run_dir / stage.directory)
        numbers = [str(line["job"]) for line in (known.get(stage.name, {}), noted) if "job" in line]
        latest = max(filter(str.isdecimal, numbers), key=int, default=None)
        number = queued.get(stage.name) or latest
        found.append(_row(run_dir, stage, number, noted, standing[stage.name]))
    return found


def _parts(run_dir: Path, stage: Stage, known: dict[str, dict[str, Any]]) -> list[StageStatus]:
    """A row each for the parts of ``prepare`` that were submitted with it, until it is done."""
    if stage.name != prepare_array.WHOLE or state.done(run_dir, stage) is not None:
        return []
    submission = known.get(stage.name, {}).get("submission")
    numbers = {
        name: str(known[name]["job"])
        for name in (prepare_array.BEGIN, prepare_array.SHARDS)
        if submission and known.get(name, {}).get("submission") == submission
    }
    found = []
    for name, number in numbers.items():
        part = dataclasses.replace(stage, name=name)
        if name == prepare_array.BEGIN:
            noted = run_jobs.begun(run_dir / part.directory)
            standing = state.statuses(run_dir, (part,))[name]
            found.append(_row(run_dir, part, number, noted, standing))
        else:
            found.append(array_row(run_dir, part, number, int(known[name]["tasks"])))
    return found


def _row(
    run_dir: Path,
    stage: Stage,
    number: str | None,
    noted: dict[str, Any],
    standing: tuple[str, str],
) -> StageStatus:
    directory = run_dir / stage.directory
    job = commands.show(number) if number else None
    record = state.done(run_dir, stage)
    done = standing[0] == "done"
    if job is not None and not run_jobs.is_of(job, run_dir, stage, noted):
        job = None  # Slurm counts anew: another run's job
    seen = StageProgress(directory).read()
    word = _word(job, standing[0])
    if word == "interrupted" and _is_run(run_dir, directory):
        word = "running"
    starting = word == "running" and seen.starting
    running = word == "running" and not starting
    forgotten = job is not None and record is not None and _forgotten(job, record)
    active = job is not None and job.active and (not done or job.held or forgotten)
    if job is not None and forgotten:
        note = _FORGOTTEN % job.number
    elif job is not None and active:
        note = why_waiting(job, done) or slow_in_words(seen.summary.slow_ranks)
    elif word == "not started" and number:  # its controller was killed before it had noted it
        note = f"Slurm no longer knows its job {number}: submit again"
    elif word == "not started" and directory.is_symlink():
        place = directory.resolve()
        note = (
            f"is made in {place}" if place.parent.is_dir() else f"its link leads nowhere: {place}"
        )
    elif word == "running":
        note = slow_in_words(seen.summary.slow_ranks)
    elif not done and (word == "failed" or job is not None):
        note = _last_words(run_dir, stage, word, job)
    else:
        note = standing[1]
    return StageStatus(
        stage=stage.name,
        job=number or "",
        state=word,
        nodes=job.nodes if job else "",
        step=_step(seen, word),
        loss=None if starting else seen.loss,
        tokens_per_second=seen.tokens_per_second if running else None,
        mfu=seen.mfu if running else None,
        left=_left(seen, job) if running else "",
        restarts=job.restarts if job else 0,
        active=active,
        numbers=seen.summary.values(read_attempts(directory), _finished(record)),
        slow_ranks=seen.summary.slow_ranks,
        experts=seen.summary.experts,
        note=note,
    )


def _step(seen: StageProgress, word: str) -> str:
    """How far a stage is; one that was begun again says nothing of it before it goes on."""
    if word == "running" and seen.starting:
        return "starting"
    return f"{seen.done:.0f}/{seen.total:.0f}" if seen.total and not seen.text else seen.text


def _word(job: commands.SlurmJob | None, standing: str) -> str:
    """Where a stage stands: what its job does, or how the stage ended (``state.statuses``)."""
    if job is not None and job.active and job.held:
        return "held"
    if standing == "done" or job is None:
        return standing
    return job.state.lower() if job.active else _ended(job, standing)


def _is_run(run_dir: Path, directory: Path) -> bool:
    """Whether a stage was begun by the ``btx run`` that is at work."""
    since, attempts = locks.run_since(run_dir), state.read_attempts(directory)
    return since is not None and bool(attempts) and attempts[-1]["time"] >= since


def _left(seen: StageProgress, job: commands.SlurmJob | None) -> str:
    if job is None:
        return "" if seen.seconds_left is None else clock(seen.seconds_left)
    limit = job.time_left or "no limit"
    return limit if seen.seconds_left is None else f"{clock(seen.seconds_left)} of {limit}"


def _ended(job: commands.SlurmJob, standing: str) -> str:
    """How a stage ended whose job is over, and which is not done."""
    if standing in ("out of date", "failed"):
        return standing
    if job.state.startswith("CANCELLED"):
        return "cancelled"
    return standing if standing == "stopped" else job.state.lower().replace("_", " ")


def _last_words(run_dir: Path, stage: Stage, word: str, job: commands.SlurmJob | None) -> str:
    directory = run_dir / stage.directory
    if word == "cancelled" and job is not None and job.reason.startswith("Depend"):
        return "a stage that it waits for was not done, or Slurm has lost its job: submit again"
    found = cause(directory, job, run_jobs.log_file(run_dir, stage))
    if not found and word == "failed":
        return "no log: do the nodes share the run's directory?"
    return found


_FORGOTTEN = """\
the stage is done, but Slurm still lists its job as running: slurmctld was killed as the job ended.
fix: `scontrol requeue %s` lets it end anew, and what waits for it go on"""
_ENDING = 60.0
"""Seconds from a stage's ``done.json`` to the end of its job, and more than enough of them."""


def _forgotten(job: commands.SlurmJob, record: dict[str, Any]) -> bool:
    """Whether Slurm has forgotten that a job has ended, whose stage is done."""
    finished = _finished(record)
    since = 0.0 if finished is None else time.time() - finished
    return job.state == "RUNNING" and since > _ENDING


def _finished(record: dict[str, Any] | None) -> float | None:
    """When a stage was done, by its ``done.json``."""
    finished = (record or {}).get("finished")
    return finished if isinstance(finished, int | float) else None


_NODES = 4
"""Named at most."""


def array_row(run_dir: Path, stage: Stage, number: str, tasks: int) -> StageStatus:
    """The row of an array of ``tasks`` jobs whose number is ``number``.

    Raises:
        Silent: the controller does not answer.
    """
    places = [run_dir / stage.directory / str(task) for task in range(tasks)]
    over = [(find_json(place / "done.json") or {}).get("key") == stage.key for place in places]
    by_task = {
        job.task: job for job in commands.show_array(number) if job.name.startswith(stage.name)
    }
    active = [job for job in by_task.values() if job.active]
    at_work = [job for job in active if job.state == "RUNNING"]
    seen = {
        task: StageProgress(place).read() for task, place in enumerate(places) if not over[task]
    }
    running = [seen[int(job.task)] for job in at_work if job.task.isdecimal() and
               int(job.task) in seen]  # fmt: skip
    share = (sum(over) + sum(one.done for one in seen.values())) / tasks
    rate = sum(one.bytes_per_second for one in running)
    speed = f", {rate / 1e6:.1f} MB/s" if rate else ""
    left = max((one.seconds_left or 0.0 for one in running), default=0.0)
    return StageStatus(
        stage=stage.name,
        job=number,
        state=_array_word(places, over, active, by_task.values()),
        nodes=_nodes(at_work),
        step=f"{sum(over)} of {tasks} done{speed}, {share:.0%}",
        left=clock(left) if left else "",
        restarts=sum(job.restarts for job in by_task.values()),
        active=bool(active),
        note=_array_note(stage, places, over, active, by_task),
    )


def _array_word(
    places: Sequence[Path],
    over: Sequence[bool],
    active: Sequence[commands.SlurmJob],
    jobs: Iterable[commands.SlurmJob],
) -> str:
    """Where the array stands, in one word: what its liveliest job does."""
    states = {job.state for job in active}
    if active:
        held = any(job.held for job in active) and "RUNNING" not in states
        return "held" if held else min(states, key=lambda word: word != "RUNNING").lower()
    if all(over):
        return "done"
    ended = sorted({job.state.partition(" ")[0] for job in jobs} - {"COMPLETED"})
    failed = "FAILED" in ended or any((place / "error.json").exists() for place in places)
    return "failed" if failed else (ended or ["ended"])[0].lower().replace("_", " ")


def _nodes(jobs: Sequence[commands.SlurmJob]) -> str:
    names = sorted({job.nodes for job in jobs})
    return ",".join(names[:_NODES]) + (",..." if len(names) > _NODES else "")


def _array_note(
    stage: Stage,
    places: Sequence[Path],
    over: Sequence[bool],
    active: Sequence[commands.SlurmJob],
    jobs: Mapping[str, commands.SlurmJob],
) -> str:
    """The first job of the array that ended without being done, or why the others wait."""
    for task, place in enumerate(places):
        job = jobs.get(str(task))
        ended = job is not None and not job.active and not job.state.startswith("CANCELLED")
        if not over[task] and (ended or (place / "error.json").exists()):
            log = state.log_file(place, state.next_attempt(place) - 1)
            words = cause(place, job, log if log.exists() else None)
            return f"{stage.name}/{task}: {words}"
    waiting = [job for job in active if job.state == "PENDING"]
    return waiting[0].reason if len(waiting) == len(active) > 0 else ""
