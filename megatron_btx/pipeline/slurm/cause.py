"""Why a stage ended without being done, or waits. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from megatron_btx.files import find_json
from megatron_btx.pipeline.slurm.commands import SlurmJob

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
_WARNING = re.compile(r"\s|.*\b\w*Warning: ")
"""A line of Python's for a warning, and its line of code."""
_LOOKED_AT = 400


def cause(directory: Path, job: SlurmJob | None, log: Path | None) -> str:
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
    plain = [line for line in own if not _WARNING.match(line)]
    return (plain or lines or [""])[-1]


def _told(directory: Path, job: SlurmJob | None) -> tuple[str, str] | None:
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


_HELD = """\
Slurm holds it (%s) until it is told otherwise.
fix: remove the cause (of a failed launch it is in slurmd's log on the node: ask the \
administrators), then `scontrol release %s`; or `btx cancel`"""


def why_waiting(job: SlurmJob, done: bool) -> str:
    """Why a job that is in the queue does not run; empty if it does."""
    if job.held:
        text = _HELD % (job.reason.replace("_", " ") or job.state.lower(), job.number)
        return text if not done else f"the stage is done, its job is not. {text}"
    return job.reason if job.state == "PENDING" else ""
