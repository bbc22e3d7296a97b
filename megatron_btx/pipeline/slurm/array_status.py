"""Where the array of jobs of ``prepare`` stands, in one row. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_btx.files import find_json
from megatron_btx.pipeline import state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.local.progress import StageProgress, clock
from megatron_btx.pipeline.slurm import commands
from megatron_btx.pipeline.slurm.cause import cause
from megatron_btx.pipeline.slurm.status_table import StageStatus

_NODES = 4
"""Named at most."""


def row(run_dir: Path, stage: Stage, number: str, tasks: int) -> StageStatus:
    """The row of an array of ``tasks`` jobs whose number is ``number``.

    Raises:
        Silent: the controller does not answer.
    """
    places = [run_dir / stage.directory / str(task) for task in range(tasks)]
    over = [(find_json(place / "done.json") or {}).get("key") == stage.key for place in places]
    jobs = {job.task: job for job in commands.show_array(number) if job.name.startswith(stage.name)}
    active = [job for job in jobs.values() if job.active]
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
        state=_word(places, over, active, jobs.values()),
        nodes=_nodes(at_work),
        step=f"{sum(over)} of {tasks} done{speed}, {share:.0%}",
        left=clock(left) if left else "",
        restarts=sum(job.restarts for job in jobs.values()),
        active=bool(active),
        note=_note(stage, places, over, active, jobs),
    )


def _word(
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


def _note(
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
