"""What tests have other processes do; imports little, so that these start at once."""

from __future__ import annotations

import os
import signal


def kill_second(task: int) -> None:
    """End the process of the second task."""
    if task == 1:
        os.kill(os.getpid(), signal.SIGKILL)
