"""Slurm's commands, and what they answer. Imports no torch."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_btx.errors import UserError

ACTIVE = frozenset(
    ["PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD"]
    + ["REQUEUE_FED", "RESIZING", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED"]
)
"""States of a job that is not over."""

_HELD_STATES = ("REQUEUE_HOLD", "SPECIAL_EXIT")
_HELD = re.compile(r"JobHeld|\bheld\b", re.IGNORECASE)
_GONE = re.compile(r"Invalid job id", re.IGNORECASE)
_FIELD = re.compile(r"(?:^| )(\w+)=(.*?)(?= [A-Z][\w:/]*=| *$)")
_BETWEEN = "\x1f"
"""Separates the fields that we ask for; it cannot occur in a job's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmJob:
    """What Slurm says of a job."""

    number: str
    name: str
    state: str
    task: str = ""
    """Of an array: its number in it, or several (``4-63``) of those that wait."""
    user: str = ""
    directory: str = ""
    command: str = ""
    """Script and arguments, as it was submitted."""
    comment: str = ""
    stage: str = ""
    """Of the run that the job was found for."""
    reason: str = ""
    nodes: str = ""
    restarts: int = 0
    time_left: str = ""

    @property
    def active(self) -> bool:
        """Whether it runs or will."""
        return self.state in ACTIVE

    @property
    def held(self) -> bool:
        """Whether Slurm waits for a person to let it go."""
        return self.state in _HELD_STATES or bool(_HELD.search(self.reason.replace("_", " ")))


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """Nodes of a partition that are alike."""

    partition: str
    default: bool
    count: int
    cpus: int
    gpus: int
    limit: float | None
    """Minutes a job may take; ``None``: no limit."""


class Refused(Exception):
    """A command of Slurm's ended with an error; its text."""


class Silent(UserError):
    """The controller does not answer."""


def call(
    *command: str, text: str | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """Standard output of a command.

    Raises:
        Refused: it failed.
        UserError: there is no such command, or it does not answer.
    """
    try:
        done = subprocess.run(
            command,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
            check=False,
        )
    except FileNotFoundError:
        raise UserError(
            command[0],
            "Slurm's command is not on this machine",
            "run this on a login node of the cluster; `--dry-run` and `btx run` need no Slurm",
        ) from None
    except subprocess.TimeoutExpired:
        raise Silent(
            command[0], "does not answer", "see `scontrol ping`, try again later"
        ) from None
    if done.returncode != 0:
        raise Refused(_words(done.stderr or done.stdout) or f"exit code {done.returncode}")
    return done.stdout


def _words(text: str) -> str:
    """A command's error message in one line, without the command's name."""
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line) for line in text.splitlines()]
    return "; ".join(line for line in lines if line)


def environment() -> dict[str, str]:
    """This process's environment without what would tell sbatch or srun something else than the
    recipe: variables of a job that this runs in, and a user's defaults (but for the account)."""
    keep = ("SLURM_CONF", "SLURM_CLUSTERS", "SBATCH_ACCOUNT", "SBATCH_CLUSTERS")
    return {
        name: value
        for name, value in os.environ.items()
        if name in keep or not name.startswith(("SLURM", "SBATCH_", "SRUN_", "SALLOC_"))
    }


def queued(users: Iterable[str] = ()) -> list[SlurmJob]:
    """Jobs that are not over, as far as this user may see them.

    Args:
        users: of these only, but for those whom this machine does not know; by default of all.

    Raises:
        Silent: the controller does not answer.
    """
    fields = ("%A", "%T", "%r", "%u", "%j", "%Z", "%o")
    try:
        of = [f"--user={','.join(filter(_is_user, sorted(users)))}"] if users else []
        lines = call("squeue", "-h", *of, "-o", _BETWEEN.join(fields)).splitlines()
    except Refused as error:
        raise _silent("squeue", error) from None
    jobs = []
    for line in lines:
        words = line.split(_BETWEEN)
        if len(words) != len(fields):
            continue  # a name with a line break is none of ours
        number, state, reason, user, name, directory, command = words
        jobs.append(
            SlurmJob(
                number=number,
                name=name,
                state=state,
                reason=reason,
                user=user,
                directory=directory,
                command=command,
            )
        )
    return jobs


def _is_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return name == me()
    return True


def jobs_private() -> bool:
    """Whether a user sees only their own jobs (``PrivateData=jobs``).

    Raises:
        Silent: the controller does not answer.
    """
    try:
        text = call("scontrol", "show", "config")
    except Refused as error:
        raise _silent("scontrol", error) from None
    match = re.search(r"^PrivateData\s*=\s*(\S+)", text, re.MULTILINE)
    return match is not None and bool({"jobs", "all"} & set(match[1].split(",")))


def show(number: str) -> SlurmJob | None:
    """A job, also a finished one as long as the controller remembers it."""
    return next(iter(show_array(number)), None)


def show_array(number: str) -> list[SlurmJob]:
    """Every job of an array, those that wait together as one; of another job that job."""
    try:
        text = call("scontrol", "-o", "show", "job", number)
    except Refused as error:
        if _GONE.search(str(error)):
            return _accounted(number)
        raise _silent("scontrol", error) from None
    return [_told(number, line) for line in text.splitlines() if line.strip()]


def _told(number: str, line: str) -> SlurmJob:
    """What ``scontrol`` says of a job in a line."""
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(line):
        fields.setdefault(name, value)
    nodes = fields.get("NodeList", "")
    return SlurmJob(
        number=number,
        task=fields.get("ArrayTaskId", ""),
        name=fields.get("JobName", ""),
        user=fields.get("UserId", "").partition("(")[0],
        comment=fields.get("Comment", ""),
        command=fields.get("Command", ""),
        directory=fields.get("WorkDir", ""),
        state=fields.get("JobState", ""),
        reason="" if fields.get("Reason") == "None" else fields.get("Reason", ""),
        nodes="" if nodes == "(null)" else nodes,
        restarts=int(fields.get("Restarts", "0")),
        time_left=_left(fields.get("TimeLimit", ""), fields.get("RunTime", "")),
    )


def _accounted(number: str) -> list[SlurmJob]:
    """From the accounting database, where there is one."""
    fields = ("JobID", "JobName", "State", "NodeList", "User", "Comment", "WorkDir")
    try:
        text = call("sacct", "-n", "-P", "-X", "-j", number, "-o", ",".join(fields))
    except (Refused, UserError):
        return []
    lines = [line.split("|", len(fields) - 1) for line in text.splitlines()]
    return [
        SlurmJob(
            number=number,
            task=of.partition("_")[2].strip("[]"),
            name=name,
            state=state.split(" ")[0],
            nodes="" if nodes == "None assigned" else nodes,
            user=user,
            comment=comment,
            directory=directory,
        )
        for of, name, state, nodes, user, comment, directory in (
            line for line in reversed(lines) if len(line) == len(fields)
        )
    ]


def me() -> str:
    """This user, as Slurm names its own."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def nodes() -> list[Nodes]:
    """The cluster's nodes by partition, as ``sinfo`` lists them."""
    try:
        lines = call("sinfo", "-h", "-e", "-o", "%P|%D|%c|%l|%G").splitlines()
    except Refused as error:
        raise _silent("sinfo", error) from None
    found = []
    for line in lines:
        partition, count, cpus, limit, gres = line.split("|", 4)
        found.append(
            Nodes(
                partition=partition.rstrip("*"),
                default=partition.endswith("*"),
                count=int(count),
                cpus=int(cpus.rstrip("+")),
                gpus=sum(int(n) for n in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres)),
                limit=minutes(limit),
            )
        )
    return found


def check_answers() -> None:
    """Raises:
    Silent: the controller does not answer.
    """
    try:
        text = call("scontrol", "ping")
    except Refused as error:
        text = str(error)
    if " is UP" not in text:
        raise Silent("scontrol ping", text.partition("; *")[0], "try again once it answers")


def cancel(numbers: Iterable[str]) -> None:
    """Cancel jobs; those that have ended already are left alone."""
    numbers = list(numbers)
    if not numbers:
        return
    try:
        call("scancel", *numbers)
    except Refused as error:
        if re.search("permission denied", str(error), re.IGNORECASE):
            fix = "ask the user whose they are (`btx status`), or an administrator"
            raise UserError("scancel", str(error), fix) from None
        if not _GONE.search(str(error)):
            raise _silent("scancel", error) from None


def minutes(text: str) -> float | None:
    """A time as Slurm writes it (``1-12:00:00``, ``30:00``, ``90``); ``None`` for no limit."""
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in parts) or (dash and not days.isdigit()):
        return None
    values = [int(part) for part in parts]
    if dash:  # D-H[:M[:S]]
        hours, minute, second = (*values, 0, 0)[:3]
        return int(days) * 1440 + hours * 60 + minute + second / 60
    if len(values) == 3:
        return values[0] * 60 + values[1] + values[2] / 60
    return values[0] + (values[1] / 60 if len(values) == 2 else 0)


def _left(limit: str, spent: str) -> str:
    allowed, used = minutes(limit), minutes(spent)
    if allowed is None or used is None:
        return ""
    left = max(0, round(60 * (allowed - used)))
    hours, rest = divmod(left, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _silent(command: str, error: Refused) -> Silent:
    return Silent(command, str(error), "see `scontrol ping`: does the controller answer?")
