"""How ranks are started on this machine. Imports no torch.

With GPUs each rank is a process that ``subprocess`` starts. On CPUs, where importing torch and
Megatron is most of a short stage (four to seven seconds of a core a rank), ranks are forked from
one process that has imported both (fork_server.py).

A forked rank is a child of *this* process all the same, and dies with it, is waited for and is
signalled like any other: the server forks it from a process between them that ends at once, and the
kernel gives what that leaves to the nearest ancestor that is a "subreaper" (prctl(2)), which this
process is until it has heard of all ranks that it has asked for.
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
"""Bytes that a rank may write over in the server's command line and in the value of its mark, which
has a name of at most 100 characters (recipe/check.py)."""
DECLINED = b"declined"
"""A server's only answer if it does not fork ranks; else each is a process id."""

_SERVER = (sys.executable, "-m", "megatron_btx.pipeline.local.fork_server")
_PR_SET_CHILD_SUBREAPER = 36
_NOW = socket.MSG_DONTWAIT


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
    can_adopt = sys.platform.startswith("linux") and _adopt(True) and _adopt(False)
    return ForkServer() if can_adopt and not gpus else Processes(WORKER)


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
    """Each rank is forked from one process, which begins with the first of them. Where that cannot
    import torch and Megatron, or finds CUDA, each is a process of its own."""

    def __init__(self) -> None:
        self._server: _Server | None = None

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Rank:
        """As every launcher does."""
        if self._server is not None and self._server.declines:
            return Processes(WORKER).start(arguments, environment, log)
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


class _Server:
    """The process that forks: what is asked of it and what it answers are lines, in order."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        token = environment[reaper.MARK].partition("/")[0]
        # A rank writes its own over it. Not with zeros: two of them end what /proc shows.
        self._environment = {**environment, reaper.MARK: f"{token}/".ljust(ROOM, ".")}
        self._channel, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            command = (*_SERVER, str(number), " " * ROOM)
            self.process = _start(command, self._environment, log, pass_fds=[number])
        self.declines = False
        self._asked: deque[_Asked] = deque()
        self._unsent = self._heard = b""

    def fork(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Rank:
        """Ask for a rank."""
        theirs = self._environment
        names = environment.keys() | theirs.keys()
        changes = {n: environment.get(n) for n in names if environment.get(n) != theirs.get(n)}
        request = {"arguments": list(arguments), "environment": changes, "log": str(log)}
        rank = _Asked(self, arguments, environment, log)
        self._asked.append(rank)
        self._unsent += json.dumps(request).encode() + b"\n"
        _adopt(True)
        self.exchange()
        return rank

    def exchange(self) -> None:
        """Send and hear what can be without waiting; the server may be importing torch."""
        ended = self.process.poll()
        with contextlib.suppress(OSError):  # full, or it has ended
            while self._unsent:
                self._unsent = self._unsent[self._channel.send(self._unsent, _NOW) :]
        with contextlib.suppress(OSError):  # nothing there, or it has ended
            while new := self._channel.recv(4096, _NOW):
                self._heard += new
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            if line == DECLINED:
                self.declines = True
            else:
                self._asked.popleft().begins(_Child(int(line)))
        while self._asked and (self.declines or ended is not None):
            rank = self._asked.popleft()
            if self.declines:
                rank.begins_alone()
            else:
                rank.never_begins(ended or 1)
        if not self._asked:
            _adopt(False)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.exchange()
        self._channel.close()


class _Asked:
    """A rank that a server was asked for. Until it has begun, the server is its process."""

    def __init__(
        self,
        server: _Server,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
    ) -> None:
        self.process: _Child | subprocess.Popen[bytes] | None = None
        self._server = server
        self._request = (arguments, environment, log)
        self._signals: list[int] = []
        self._never: int | None = None

    @property
    def returncode(self) -> int | None:
        return self._never if self.process is None else self.process.returncode

    def poll(self) -> int | None:
        if self.process is None and self._never is None:
            self._server.exchange()
        return self._never if self.process is None else self.process.poll()

    def send_signal(self, number: int, /) -> None:
        if self.poll() is not None:
            return
        if self.process is not None:
            self.process.send_signal(number)
        else:  # the server may have forked it already, and be about to tell
            self._signals.append(number)
            self._server.process.send_signal(number)

    def begins(self, process: _Child | subprocess.Popen[bytes]) -> None:
        """It has been forked."""
        self.process = process
        for number in self._signals:
            process.send_signal(number)

    def begins_alone(self) -> None:
        """It will not be forked, and is started."""
        arguments, environment, log = self._request
        self.begins(_start((*WORKER, *arguments), environment, log))

    def never_begins(self, code: int) -> None:
        """The server has ended so before it forked it."""
        self._never = code


class _Child:
    """A process that another one has forked and that is a child of this one now."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # SIGCHLD is ignored here: nobody learns, as in subprocess
                pid, status = self.pid, 0
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int, /) -> None:
        if self.poll() is None:
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
