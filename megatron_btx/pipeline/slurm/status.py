"""Where every stage of a submitted run stands: from Slurm, and from what it has written. Needs no
accounting database; a job that Slurm has forgotten is known by its files. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.files import find_json
from megatron_btx.pipeline import numbers, state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.local.progress import Standing, amount, clock
from megatron_btx.pipeline.slurm import commands, jobs
from megatron_btx.train.goodput import read_attempts
from megatron_btx.train.summary import slow_in_words

COLUMNS = ("stage", "job", "state", "nodes", "step", "loss", "tokens/s", "MFU", "goodput", "left",
           "restarts")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStatus:
    """One stage."""

    stage: str
    job: str = ""
    state: str = ""
    """Slurm's word for an active job, or ``held``; else ``done``, ``failed``, ``stopped``,
    ``cancelled``, ``left``."""
    nodes: str = ""
    step: str = ""
    loss: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    """Model FLOPs utilisation of the last step, of 1."""
    left: str = ""
    """Until the last step at the present pace; and the job's time limit, where it comes before."""
    restarts: int = 0
    active: bool = False
    """Whether its job is in the queue."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Of the stage so far (train/summary.py)."""
    slow_ranks: Mapping[str, float] = field(default_factory=dict)
    """By ``RANK@HOST``: how many times as long as the median rank it works."""
    experts: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    """Of an MoE: how evenly its experts are used, by domain and layer."""
    note: str = ""
    """Why it waits, or the last thing that a failed one said."""

    @property
    def cells(self) -> tuple[str, ...]:
        """As the table shows it."""
        loss = "" if self.loss is None else f"{self.loss:.3f}"
        speed = amount(self.tokens_per_second) if self.tokens_per_second else ""
        restarts = str(self.restarts) if self.restarts else ""
        where = (self.stage, self.job, self.state, self.nodes)
        mfu = "" if self.mfu is None else numbers.percent(self.mfu)
        share = self.numbers.get("goodput/share")
        goodput = "" if share is None else numbers.percent(share)
        return (*where, self.step, loss, speed, mfu, goodput, self.left, restarts)


def rows(run_dir: Path, stages: tuple[Stage, ...]) -> list[StageStatus]:
    """A row a stage; ``run_dir`` is absolute.

    Raises:
        Silent: the controller does not answer.
    """
    known = jobs.submitted(run_dir)
    # Those whose submission was killed before it could write them down, and those that were
    # submitted by hand, are in the queue.
    queued: dict[str, str] = {}
    try:
        queued = {job.stage: job.number for job in jobs.active(run_dir, stages)}
    except UserError:  # a run of this machine needs no Slurm to be looked at
        if known or any("job" in jobs.begun(run_dir / stage.directory) for stage in stages):
            raise
    found = []
    for stage in stages:
        noted = jobs.begun(run_dir / stage.directory)
        numbers = [str(line["job"]) for line in (known.get(stage.name, {}), noted) if "job" in line]
        latest = max(filter(str.isdecimal, numbers), key=int, default=None)
        found.append(_row(run_dir, stage, queued.get(stage.name) or latest, noted))
    return found


def _row(run_dir: Path, stage: Stage, number: str | None, noted: dict[str, Any]) -> StageStatus:
    directory = run_dir / stage.directory
    job = commands.show(number) if number else None
    record = state.done(run_dir, stage)
    done = record is not None
    if job is not None and not jobs.is_of(job, run_dir, stage, noted):
        job = None  # Slurm counts anew: another run's job
    seen = Standing(directory).read()
    word = _word(directory, job, done)
    forgotten = job is not None and record is not None and _forgotten(job, record)
    active = job is not None and job.active and (not done or job.held or forgotten)
    if job is not None and forgotten:
        note = _FORGOTTEN % job.number
    elif job is not None and active:
        note = _waits(job, done) or slow_in_words(seen.summary.slow_ranks)
    elif word == "left" and number:  # its controller was killed before it had written it down
        note = f"Slurm no longer knows its job {number}: submit again"
    else:
        note = "" if done or word == "left" else _last_words(run_dir, stage, word, job)
    return StageStatus(
        stage=stage.name,
        job=number or "",
        state=word,
        nodes=job.nodes if job else "",
        step=f"{seen.done:.0f}/{seen.total:.0f}" if seen.total and not seen.text else seen.text,
        loss=seen.loss,
        tokens_per_second=seen.tokens_per_second if word == "running" else None,
        mfu=seen.mfu if word == "running" else None,
        left=_left(seen, job) if job is not None and word == "running" else "",
        restarts=job.restarts if job else 0,
        active=active,
        numbers=seen.summary.values(read_attempts(directory), _finished(record)),
        slow_ranks=seen.summary.slow_ranks,
        experts=seen.summary.experts,
        note=note,
    )


def _word(directory: Path, job: commands.SlurmJob | None, done: bool) -> str:
    """Where a stage stands, in one word."""
    if job is not None and job.active and job.held:
        return "held"
    if done:
        return "done"
    return job.state.lower() if job is not None and job.active else _ended(directory, job)


def _left(seen: Standing, job: commands.SlurmJob) -> str:
    limit = job.time_left or "no limit"
    return limit if seen.seconds_left is None else f"{clock(seen.seconds_left)} of {limit}"


def _ended(directory: Path, job: commands.SlurmJob | None) -> str:
    """How a stage that is neither done nor in the queue ended."""
    if (directory / "error.json").exists():
        return "failed"
    if job is not None and job.state.startswith("CANCELLED"):
        return "cancelled"
    if (directory / "stopped.json").exists():
        return "stopped"
    if job is not None:
        return "failed" if job.state == "FAILED" else job.state.lower().replace("_", " ")
    return "ended" if (directory / "attempts.jsonl").exists() else "left"


def _last_words(run_dir: Path, stage: Stage, word: str, job: commands.SlurmJob | None) -> str:
    directory = run_dir / stage.directory
    if word == "cancelled" and job is not None and job.reason.startswith("Depend"):
        return "a stage that it waits for was not done, or Slurm has lost its job: submit again"
    found = cause(directory, job, log_file(run_dir, stage))
    if not found and word == "failed":
        return "no log: do the nodes share the run's directory?"
    return found


_FORGOTTEN = """\
the stage is done, and Slurm takes its job for running: its controller was killed as it ended.
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


_HELD = """\
Slurm holds it (%s) until it is told otherwise.
fix: mend the cause (a launch that failed is in slurmd's log on the node: ask the administrators), \
then `scontrol release %s`; or `btx cancel`"""


def _waits(job: commands.SlurmJob, done: bool) -> str:
    """Why a job that is in the queue does not run."""
    if job.held:
        text = _HELD % (job.reason.replace("_", " ") or job.state.lower(), job.number)
        return text if not done else f"the stage is done, its job is not. {text}"
    return job.reason if job.state == "PENDING" else ""


def log_file(run_dir: Path, stage: Stage) -> Path | None:
    """Where to read what a stage says: its latest attempt, or the batch script's own words where
    these are newer or no rank has started."""
    attempt = state.next_attempt(run_dir / stage.directory) - 1
    ranks = state.log_file(run_dir / stage.directory, attempt)
    record = jobs.submitted(run_dir).get(stage.name)
    batch = run_dir / "slurm" / str((record or {}).get("submission")) / f"{stage.directory}.out"
    found = [path for path in (ranks, batch) if path.is_file() and path.stat().st_size]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def table(found: list[StageStatus]) -> str:
    """The rows as text, what there is to say about one under it."""
    cells = [COLUMNS, *(row.cells for row in found)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    lines = []
    for line, row in zip(cells, [None, *found], strict=True):
        padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
        if row is not None and row.note:
            lines += [f"    {text}" for text in row.note.splitlines()]
    return "\n".join(lines) + "\n"


def numbers_text(found: list[StageStatus]) -> str:
    """What the stages' logs say of speed, of the wall time and of the experts' use, as tables."""
    tables = numbers.tables({row.stage: row.numbers for row in found})
    tables += [numbers.experts(row.experts) for row in found if row.experts]
    return "\n".join(numbers.columns(head, rows) for head, rows in tables)


MARK = "btx: "
"""What the batch script's word on a job begins with."""

_KILLED = re.compile(
    r"srun: error: .*: task.* (Killed|Out Of Memory|Segmentation fault|Bus error|Aborted"
    r"|Floating point exception|Illegal instruction).*"
    r"|(slurmstepd|srun): error: .*(oom[-_ ]kill|out of memory|exceeded memory|TIME LIMIT"
    r"|NODE FAIL|PREEMPT).*",
    re.IGNORECASE,
)
_LAUNCHER = re.compile(r"(srun|slurmstepd|scontrol): |slurmstepd-\S+: ")
_ERROR = re.compile(r"(\d+: )?(error: .*|[\w.]*(Error|Exception|Interrupt)\b.*)")
_LOOKED_AT = 400


def cause(directory: Path, job: commands.SlurmJob | None, log: Path | None) -> str:
    """Why the stage in ``directory`` ended without being done; empty if nothing is known.

    The last line of a log is ``srun``'s, and says that a task ended. What is asked, in this order:
    what killed a rank (Slurm's message), ``error.json``, what the batch script itself left on the
    job (its comment, where there was no room for a file), an error that a rank has printed, the
    last line that is not ``srun``'s.

    Args:
        directory: the stage's.
        job: its latest, if Slurm remembers it.
        log: what was said last.
    """
    lines = [line for line in tail(log, _LOOKED_AT) if line.strip()] if log else []
    killed = next((line for line in lines if _KILLED.fullmatch(line)), "")
    if re.search("Killed", killed):
        killed += " (out of memory?)"
    told = _told(directory, job)
    if killed and (told is None or told[1] == "crash"):  # other ranks lose their connection then
        return "\n".join(filter(None, [killed, told and told[0]]))
    if told is not None:
        return told[0]
    own = [line for line in lines if not _LAUNCHER.match(line)]
    errors = [line for line in own if _ERROR.match(line)]
    if errors:
        return errors[-1]
    with contextlib.suppress(OSError):
        disk = os.statvfs(directory if directory.exists() else directory.parent)
        if disk.f_bavail * disk.f_frsize < 1 << 20:
            return f"no space left on the disk of {directory}: free some and submit again"
    return (own or lines or [""])[-1]


def _told(directory: Path, job: commands.SlurmJob | None) -> tuple[str, str] | None:
    """Message and kind of what was written down."""
    record = find_json(directory / "error.json")
    if record is not None:
        return str(record.get("message")), str(record.get("kind"))
    if job is not None and job.comment.startswith(MARK):
        return job.comment.removeprefix(MARK), "user"
    return None


def tail(path: Path, count: int) -> list[str]:
    """The last lines of a file."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 300 * count))
        return file.read().decode(errors="replace").splitlines()[-count:]
    return []
