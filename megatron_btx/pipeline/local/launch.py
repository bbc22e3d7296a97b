"""How ranks are started on this machine. Imports no torch.

With GPUs each rank is a process that ``subprocess`` starts. On CPUs, where importing torch and
Megatron is most of a short stage (four to seven seconds of a core a rank), ranks are forked from
one process that has imported both (fork_server.py).

A forked rank is a child of *this* process all the same, and dies with it, is waited for and is
signalled like any other: the server forks it from a process between them that ends at once, and the
kernel gives what that leaves to the nearest ancestor that is a "subreaper" (prctl(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from megatron_btx.pipeline.local import reaper

WORKER = (sys.executable, "-m", "megatron_btx.pipeline.worker")
ROOM = 512
"""Bytes that a rank may write over in the server's command line and in the value of its mark."""

_SERVER = (sys.executable, "-m", "megatron_btx.pipeline.local.fork_server")
_PR_SET_CHILD_SUBREAPER = 36


class Rank(Protocol):
    """As much of a ``subprocess.Popen`` as a job asks for."""

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the signal that ended it; ``None`` until it has been polled."""

    def poll(self) -> int | None:
        """``returncode``, brought up to date."""

    def send_signal(self, number: int, /) -> None:
        """Send a signal, unless it has ended."""


class Launcher(Protocol):
    """What starts ranks."""

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Rank:
        """Start one in a session of its own, so that Ctrl-C in the terminal does not reach it.

        Args:
            arguments: the worker's (worker.py).
            environment: all of it.
            log: what it prints is added to this file.
        """

    def close(self) -> None:
        """Nothing more will be started."""


def launcher_here(gpus: Sequence[str]) -> Launcher:
    """The launcher for this machine, with the ``gpus`` that it has."""
    if gpus or not sys.platform.startswith("linux") or not _adopt(True):
        return Processes(WORKER)
    return ForkServer()


class Processes:
    """Each rank is a process of its own.

    Args:
        worker: a rank's command; its arguments follow.
    """

    def __init__(self, worker: Sequence[str]) -> None:
        self._worker = tuple(worker)

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Rank:
        """As every launcher does."""
        return _start((*self._worker, *arguments), environment, log)

    def close(self) -> None:
        """There is nothing to end."""


class ForkServer:
    """Each rank is forked from one process, which begins with the first of them. This process must
    be a subreaper (``launcher_here``)."""

    def __init__(self) -> None:
        self._server: _Server | None = None

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Rank:
        """As every launcher does."""
        if self._server is not None and self._server.process.poll() is not None:
            self._server.close()  # it was killed; its ranks were not
            self._server = None
        if self._server is None:
            self._server = _Server(environment, log)
        return self._server.fork(arguments, environment, log)

    def close(self) -> None:
        """End the server; ranks go on."""
        if self._server is not None:
            self._server.close()
        _adopt(False)


class _Server:
    """The process that forks: what is asked of it and what it answers are lines, in order."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        token = environment[reaper.MARK].partition("/")[0]
        self.environment = {
            **environment,
            # A rank writes its own over it. Not with zeros: two of them end what /proc shows.
            reaper.MARK: f"{token}/".ljust(ROOM, "."),
            # The threads of a pool do not live on in a fork; a rank makes its own.
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._channel, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            command = (*_SERVER, str(number), " " * ROOM)
            self.process = _start(command, self.environment, log, pass_fds=[number])
        self._asked: deque[_Forked] = deque()
        self._heard = b""

    def fork(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> _Forked:
        names = environment.keys() | self.environment.keys()
        other = {
            n: environment.get(n) for n in names if environment.get(n) != self.environment.get(n)
        }
        request = {"arguments": list(arguments), "environment": other, "log": str(log)}
        rank = _Forked(self)
        self._asked.append(rank)
        with contextlib.suppress(OSError):  # it has ended: poll() tells
            self._channel.sendall(json.dumps(request).encode() + b"\n")
        return rank

    def listen(self) -> None:
        """Hear which ranks have been forked, or that none will be any more."""
        ended = self.process.poll()
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while new := self._channel.recv(4096, socket.MSG_DONTWAIT):
                self._heard += new
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            self._asked.popleft().pid = int(line)
        if ended is not None:
            for rank in self._asked:
                rank.returncode = ended or 1
            self._asked.clear()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.listen()
        self._channel.close()


class _Forked:
    """A rank that a server forks. Until it has, the server is its process."""

    def __init__(self, server: _Server) -> None:
        self.returncode: int | None = None
        self.pid: int | None = None
        self._server = server

    def poll(self) -> int | None:
        if self.returncode is None and self.pid is None:
            self._server.listen()
        if self.returncode is None and self.pid is not None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int, /) -> None:
        if self.poll() is not None:
            return
        if self.pid is None:
            self._server.process.send_signal(number)
        else:
            os.kill(self.pid, number)


def _start(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=pass_fds,
        )


def _adopt(wanted: bool) -> bool:
    """Become the parent of what descendants leave, or no longer; whether that is possible."""
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0) == 0)
