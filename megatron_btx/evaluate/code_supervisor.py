"""Runs one Python program and ends with it everything that it started. A script of its own: it
imports nothing of ours, and is started with ``python -I``.

    code_supervisor.py PROGRAM SECONDS CLOCK MEMORY FILE_SIZE

Exit code 0: the program reached its last line and ended with 0; 1: anything else, also when it took
SECONDS of the processor or CLOCK on the clock. It ends the program when its own standard input is
closed, that is, when whoever started it has died.

As a child subreaper (prctl(2)) it becomes the parent of processes whose own parent has ended, also
of those that left the session (``setsid``) or were forked twice: what is left below it when the
program has ended is all that the program started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import secrets
import select
import signal
import subprocess
import sys
import time

_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PDEATHSIG = 1


def main(program: str, seconds: float, clock: float, memory: int, file_size: int) -> int:
    """Run the program."""
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        return 1
    proof = secrets.token_hex(16)
    read, write = os.pipe()
    # The last line proves that no `exit` came before it in this process, forked off or not.
    last = f"os.write({write}, b'{proof} %d' % os.getpid())"
    with open(program, "ab") as file:
        file.write(f"\n\nimport os; {last}\n".encode())
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    process = subprocess.Popen(
        [sys.executable, "-I", program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(write,),
        start_new_session=True,
        preexec_fn=lambda: _limit(seconds, memory, file_size),
    )
    os.close(write)
    end = time.monotonic() + clock
    while process.poll() is None and (left := end - time.monotonic()) > 0:
        ready, _, _ = select.select([0, woken], [], [], left)
        if 0 in ready:
            break
        if woken in ready:
            os.read(woken, 4096)
    code = process.poll()
    _end_all()
    os.set_blocking(read, False)
    with contextlib.suppress(BlockingIOError):
        return int(code != 0 or os.read(read, 64) != f"{proof} {process.pid}".encode())
    return 1


def _limit(seconds: float, memory: int, file_size: int) -> None:
    """What the program may take, set in its process before it begins."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for what, most in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # a lower limit is set already
            resource.setrlimit(what, (most, most))


def _end_all() -> None:
    """Kill and reap until nothing is left below this process. Those that are found are stopped
    first, so that none forks while it is being looked for."""
    while below := _below(os.getpid()):
        for how in (signal.SIGSTOP, signal.SIGKILL):
            for pid in below:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, how)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.001)


def _below(root: int) -> list[int]:
    """All descendants of a process."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found, left = [], [root]
    while left:
        here = children.get(left.pop(), [])
        found += here
        left += here
    return found


if __name__ == "__main__":
    _, name, seconds, clock, memory, size = sys.argv
    sys.exit(main(name, float(seconds), float(clock), int(memory), int(size)))
