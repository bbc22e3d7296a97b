"""The processes that are kept beside a rank, by Megatron's checkpoint writer and by W&B. Imports no
torch: the writer's first imports this module."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager

_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What may ask a rank to stop (train/loop.py), or a terminal all its processes."""

_PR_SET_PDEATHSIG = 1


def start() -> None:
    """Start them once, before Megatron would.

    They block the signals that ask a rank to stop: a launcher may send these to all processes
    of a task (srun does), and a rank whose helper has died of one cannot save. And they end with
    the rank, however it ends: one that is left holds its output open, and srun waits for it.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is not None:
        return
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    # The first unblocks SIGTERM behind itself, so each anew. What is blocked stays so in a child.
    with block_signals():
        resource_tracker.ensure_running()
    with block_signals():
        manager.start(end_with_parent, (os.getpid(),))
    filesystem_async._results_queue = manager.Queue()


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
