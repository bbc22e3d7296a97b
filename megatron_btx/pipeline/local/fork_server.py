"""The process from which a run's ranks are forked on CPUs (launch.py):
``python -m megatron_btx.pipeline.local.fork_server DESCRIPTOR ROOM``.

It imports torch and Megatron once, then waits for requests on the socket of that number and answers
each with the process id of a rank. It computes nothing: a pool of threads would not live on in a
fork. What differs between ranks is set anew in each: environment, session, output, threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from megatron_btx import engine
from megatron_btx.pipeline import worker
from megatron_btx.pipeline.local import reaper
from megatron_btx.pipeline.local.launch import ROOM


def serve(descriptor: int) -> None:
    """Fork a rank for every line that is read, until the run has ended."""
    reaper.die_with_parent()
    worker.limit_caches()
    # Where they cannot be imported, each rank says so, in its own log.
    with contextlib.suppress(Exception), engine.importing():
        import torch._dynamo  # noqa: F401  # torch's optimizers ask for it when they are made

        from megatron_btx.data import prepare  # noqa: F401
        from megatron_btx.evaluate import evaluate_stage, export  # noqa: F401
        from megatron_btx.train import train_stage  # noqa: F401
    with socket.socket(fileno=descriptor) as channel, channel.makefile() as requests:
        for line in requests:
            request = json.loads(line)
            _print_to(request["log"])
            read_end, write_end = os.pipe()
            between = os.fork()
            if between == 0:
                os.close(read_end)
                _fork(request, write_end, channel)
            os.close(write_end)
            rank = os.read(read_end, 32)
            os.close(read_end)
            os.waitpid(between, 0)  # from now on the rank is the run's
            if not rank:
                sys.exit(1)  # no memory, say; the process between has told
            channel.sendall(rank + b"\n")


def _fork(request: dict[str, Any], told: int, channel: socket.socket) -> NoReturn:
    """In the process between: fork the rank, tell who it is, and leave it to the run."""
    between = os.getpid()
    rank = os.fork()
    if rank:
        os.write(told, b"%d" % rank)
        os._exit(0)
    while os.getppid() == between:  # who its parent is matters to it (reaper.py)
        time.sleep(0.001)
    os.close(told)
    os.close(channel.detach())
    os.setsid()
    _set_environment(request["environment"])
    _show(" ".join((*request["arguments"], "rank", os.environ["RANK"])))
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.argv = [worker.__file__, *request["arguments"]]
    code = worker.main(request["arguments"])
    worker.leave(code)
    sys.exit(code)


def _print_to(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.close(file)


def _set_environment(changes: dict[str, str | None]) -> None:
    """Set what is the rank's own, its mark also where others see it (``/proc/PID/environ``): there
    stands what a process has begun with, and forks have not begun."""
    mark = changes[reaper.MARK]
    assert mark is not None
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    _write(libc.getenv(reaper.MARK.encode()), f"{mark}/".encode().ljust(ROOM, b"."))
    for name, value in changes.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def _show(title: str) -> None:
    """Write a title over the end of the command line, for ``ps`` and ``top``."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    end = int(fields[49 - 3])  # proc(5): field 49, arg_end; the first here is field 3
    _write(end - 1 - ROOM, title.encode(errors="surrogateescape")[:ROOM].ljust(ROOM))


def _write(address: int, value: bytes) -> None:
    assert len(value) == ROOM
    ctypes.memmove(address, value, ROOM)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
