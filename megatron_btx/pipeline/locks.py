"""Who may work in a run's directory, and in a stage's. Imports no torch.

The locks are the kernel's (``flock``): they go with the processes that hold them, however these
end, and what is written in the files is for people only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_btx.errors import UserError
from megatron_btx.files import sweep, try_lock


class Busy(UserError):
    """Processes of another attempt are at work in a stage."""


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """The run directory for this process alone.

    Raises:
        UserError: another process has it (names the process), it is another user's, or its file
            system has no locks.
    """
    path = run_dir / "lock"
    new = not path.exists()
    with _open(path) as file:
        if not try_lock(file, fcntl.LOCK_EX):
            file.seek(0)
            holder = file.read(200).decode(errors="replace").strip() or "unknown process"
            raise UserError(
                str(run_dir),
                f"another btx is at work in it ({holder})",
                "wait for it or stop it (the lock of a machine that was lost goes when the file "
                "server notices); another recipe needs another `name:` or `run_dir:`",
            )
        file.truncate(0)
        try:
            os.write(file.fileno(), f"process {os.getpid()} on {os.uname().nodename}".encode())
        except OSError:
            if new:
                path.unlink()  # no space for a line: leave as little as was found
            raise
        try:
            yield
        finally:
            file.truncate(0)


def run_since(run_dir: Path) -> float | None:
    """Since when a ``btx run`` is at work in a run's directory (seconds of the epoch); ``None``:
    none is. Reads what is written in the lock, for asking the lock itself would be to hold it."""
    path = run_dir / "lock"
    with contextlib.suppress(OSError):
        words = re.fullmatch(r"process (\d+) on (\S+)", path.read_text("utf-8", "replace"))
        if words is None:
            return None
        if words[2] == os.uname().nodename:
            with contextlib.suppress(PermissionError):  # it is another user's
                os.kill(int(words[1]), 0)
        return path.stat().st_mtime
    return None


@contextlib.contextmanager
def stage_lock(directory: Path) -> Iterator[None]:
    """For a rank and whatever it forks: says as long as one of them lives that the stage is busy.
    A fork shares the lock, so that a checkpoint writer outliving its rank still counts.

    Raises:
        UserError: another run is about to begin there, or as for :func:`run_lock`.
    """
    path = directory / "lock"
    with _open(path) as file:
        if not try_lock(file, fcntl.LOCK_SH):
            raise UserError(str(directory), "is being written by another run", "stop that one")
        yield


def wait_until_idle(directory: Path, timeout: float = 20.0) -> None:
    """Wait until the processes of a killed run have ended, and delete their unfinished files.

    Raises:
        Busy: they still run after ``timeout`` seconds.
        UserError: as for :func:`run_lock`.
    """
    deadline = time.monotonic() + timeout
    path = directory / "lock"
    with _open(path) as file:
        while not try_lock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise Busy(
                    str(directory),
                    "processes of another run are still at work in it",
                    f"see who holds it with: fuser -v {path}",
                )
            time.sleep(0.1)
        sweep(directory)


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("a+b", buffering=0)
    except PermissionError:
        owner = _owner(path if path.exists() else path.parent)
        raise UserError(
            str(path.parent),
            f"belongs to {owner}, and you may not write in it",
            f"let {owner} continue the run, or set another `run_dir:`; finished stages can be "
            "reused with `share:`",
        ) from None


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (KeyError, OSError):  # a user of another machine
        return f"user {path.stat().st_uid}"
