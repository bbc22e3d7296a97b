"""A thread of every rank that looks at what the rank's own work would not notice. Imports no torch.

A node that Slurm has lost may live on, and the ranks on it: the job has been started anew elsewhere
and waits for them (slurm/attempt.py). It leaves ``leave.json``, and they save and end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from megatron_btx.pipeline import state

_EVERY = 5.0
"""Seconds between two looks."""


@contextlib.contextmanager
def watching(directory: Path, grace: float) -> Iterator[None]:
    """While the block runs, ``directory`` is looked at; outside of Slurm nobody would leave
    anything there.

    Args:
        directory: the stage's.
        grace: seconds that a rank gets to save and end; then it is ended.
    """
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(directory, grace, over), daemon=True)
    if "SLURM_JOB_ID" in os.environ:
        thread.start()
    try:
        yield
    finally:
        over.set()


def _watch(directory: Path, grace: float, over: threading.Event) -> None:
    while not (directory / state.LEAVE).exists():
        if over.wait(_EVERY):
            return
    sys.stderr.write("this job has been started anew elsewhere: saving and ending\n")
    os.kill(os.getpid(), signal.SIGUSR1)  # as Slurm does ahead of a time limit
    if not over.wait(grace):
        os._exit(1)
