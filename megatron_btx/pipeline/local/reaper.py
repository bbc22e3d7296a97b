"""No process outlives the run that started it, however that run ends. Linux; imports no torch.

Two nets. A rank asks the kernel to be killed with the process that started it
(``PR_SET_PDEATHSIG``). What a rank starts itself (checkpoint writers, W&B's service) asks for
nothing of the kind, so the run forks a watcher before anything else: it sleeps on a pipe that only
the run holds open, and when that closes unexpectedly, it kills every process that carries the
run's mark in its environment, which all descendants inherit.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "BTX_JOB"
"""Environment variable of everything that a run starts: ``<token>/<stage>/<attempt>``. In /proc a
forked rank's goes on with a slash and dots (fork_server.py)."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask for SIGKILL when the process that started this one (``BTX_PARENT``) ends.

    The thread that started it counts, so a run starts its ranks from its main thread.
    """
    parent = os.environ.get("BTX_PARENT")
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it ended before the request was made
        os._exit(1)


def end_at_once() -> None:
    """What a rank that a launcher has started does on SIGTERM and a hang-up, unless it saves: an
    end in order would wait for a collective operation, whose other ranks have ended."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def marked(mark: str) -> list[int]:
    """Processes whose mark is ``mark`` or begins with ``mark/``."""
    needles = (f"{MARK}={mark}\0".encode(), f"{MARK}={mark}/".encode())
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            environment = Path("/proc", entry, "environ").read_bytes()
            if any(needle in b"\0" + environment for needle in (b"\0" + n for n in needles)):
                found.append(int(entry))
    return found


def kill_marked(mark: str, grace: float = 0.0) -> None:
    """End every process with the mark: SIGTERM, ``grace`` seconds, SIGKILL until none is left."""
    if grace:
        deadline = time.monotonic() + grace
        _signal(marked(mark), signal.SIGTERM)
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.05)
    deadline = time.monotonic() + 10
    while (pids := marked(mark)) and time.monotonic() < deadline:
        _signal(pids, signal.SIGKILL)
        time.sleep(0.02)


@contextlib.contextmanager
def watcher(token: str, scratch: Path) -> Iterator[None]:
    """Within this block a watcher ends what carries ``token`` should this process die, and removes
    the directory ``scratch`` behind it."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write_end)
        _watch(read_end, token, scratch)
    os.close(read_end)
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            os.write(write_end, b"end")
        os.close(write_end)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def _watch(read_end: int, token: str, scratch: Path) -> None:
    """What the watcher process runs; never returns."""
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):  # a closed terminal or pipe must look closed to its reader
            os.dup2(nowhere, standard)
        if os.read(read_end, 16) == b"":
            kill_marked(token)
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os._exit(0)


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
