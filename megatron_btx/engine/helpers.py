"""The processes that Megatron's checkpoint writer keeps beside a rank. Imports no torch: the first
of them imports this module."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager

_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What asks a rank to stop (train/signals.py)."""

_PR_SET_PDEATHSIG = 1


def start() -> None:
    """Start them once, before Megatron would.

    They are deaf to the signals that ask a rank to stop: a launcher may send these to all processes
    of a task (srun does), and a rank whose helper has died of one cannot save. And they end with
    the rank, however it ends: one that is left holds its output open, and srun waits for it.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is not None:
        return
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    # The first unblocks SIGTERM behind itself, so each anew. What is blocked stays so in a child.
    _deaf(resource_tracker.ensure_running)
    _deaf(lambda: manager.start(_end_with_parent, (os.getpid(),)))
    filesystem_async._results_queue = manager.Queue()


def _deaf(begin: object) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)
    try:
        begin()  # type: ignore[operator]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(parent: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the request was made
            os._exit(1)
