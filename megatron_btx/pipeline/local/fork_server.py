"""The process from which a run's ranks are forked on CPUs (launch.py):
``python -m megatron_btx.pipeline.local.fork_server DESCRIPTOR ROOM``.

It imports torch and Megatron once, then waits for requests on the socket of that number and answers
each with the process id of a rank. It computes next to nothing (cpu_tuning.py's trial), on one
thread: a pool of them would not live on in a fork. Each rank sets anew what is its own: session,
environment, command line, random numbers and torch's threads (numpy's BLAS keeps to one). What goes
wrong in forking a rank is printed where that rank would print.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_btx import engine
from megatron_btx.pipeline import worker
from megatron_btx.pipeline.local import reaper
from megatron_btx.pipeline.local.launch import DECLINED, ROOM


def serve(descriptor: int) -> None:
    """Fork a rank for every line that is read, until the run has ended."""
    reaper.die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent that ignores it hands that on
    environment = dict(os.environ)
    with socket.socket(fileno=descriptor) as channel, channel.makefile() as requests:
        if not preload():
            channel.sendall(DECLINED + b"\n")
            return
        for line in requests:
            _fork(json.loads(line), environment, channel)


def preload() -> bool:
    """Import what ranks do; whether they can be forked then. Not if that fails: they are to say so
    themselves, and what is imported by halves may not be imported again. Nor with CUDA: it does not
    live on in a fork either."""
    worker.limit_caches()
    os.environ.update(dict.fromkeys(worker.THREADS, "1"))
    try:
        with engine.importing():
            import torch._dynamo  # torch's optimizers ask for it when they are made

            from megatron_btx.data import prepare  # noqa: F401
            from megatron_btx.evaluate import evaluate_stage, export  # noqa: F401
            from megatron_btx.train import train_stage  # noqa: F401
    except Exception:
        return False
    return not torch.cuda.is_available()


def _fork(request: dict[str, Any], environment: Mapping[str, str], channel: socket.socket) -> None:
    """Fork a rank from a process that ends at once, so that it is the run's child. It begins when
    the run has been told, and ends instead if this process does before."""
    _print_to(request["log"])
    told, tell = os.pipe()
    going, go = os.pipe()
    between = os.fork()
    if between == 0:
        rank = os.fork()
        if rank:
            os.write(tell, b"%d" % rank)
            os._exit(0)
        for descriptor in (told, tell, go, channel.detach()):
            os.close(descriptor)
        if not os.read(going, 1):
            os._exit(1)
        os.close(going)
        _be_rank(request["arguments"], environment, request["environment"])
    os.close(tell)
    os.close(going)
    answer = os.read(told, 32)
    os.close(told)
    os.waitpid(between, 0)
    if not answer:
        sys.exit(1)  # no memory, say; the process between has told
    channel.sendall(answer + b"\n")
    os.write(go, b"!")
    os.close(go)


def _be_rank(
    arguments: list[str], environment: Mapping[str, str], changes: dict[str, str | None]
) -> None:
    """What a rank does; never returns."""
    import numpy as np
    import torch

    os.setsid()
    wanted = {**environment, **changes}
    mark = wanted[reaper.MARK]
    assert mark is not None
    _show_mark(mark)
    for name in os.environ.keys() - wanted.keys():  # an import has set it
        del os.environ[name]
    for name, value in wanted.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _show_title(" ".join((*arguments, "rank", os.environ["RANK"])))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.seed()
    np.random.seed()
    sys.argv = [worker.__file__, *arguments]
    code = worker.main(arguments)
    worker.leave(code)
    sys.exit(code)


def _print_to(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.close(file)


def _show_mark(mark: str) -> None:
    """Set the mark where others look for it: in ``/proc/PID/environ``, which has what a process has
    begun with, and forks have not begun."""
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    _write(libc.getenv(reaper.MARK.encode()), f"{mark}/".encode().ljust(ROOM, b"."))


def _show_title(title: str) -> None:
    """Write it over the blanks that end the command line, for ``ps`` and ``top``."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    end = int(fields[49 - 3])  # proc(5): field 49, arg_end; the first here is field 3
    if end > ROOM and Path("/proc/self/cmdline").read_bytes().endswith(b" " * ROOM + b"\0"):
        _write(end - 1 - ROOM, title.encode(errors="surrogateescape")[:ROOM].ljust(ROOM))


def _write(address: int, value: bytes) -> None:
    assert len(value) == ROOM
    ctypes.memmove(address, value, ROOM)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
