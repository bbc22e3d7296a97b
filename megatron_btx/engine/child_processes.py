"""Processes beside a rank: the one that writes a checkpoint, and W&B's."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator

_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What may ask a rank to stop (train/loop.py), or a terminal all its processes."""

_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """What is started within hears none of the signals that ask a rank to stop."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int) -> None:
    """Let this process end when process ``parent`` does, however it ends."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the request was made
            os._exit(1)
