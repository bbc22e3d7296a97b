"""Being asked to stop: the ranks get the signal themselves, agree on a step, save and leave."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM from a launcher or a person, SIGUSR1 from Slurm ahead of a time limit."""


class StopRequest:
    """Whether any rank has been asked to stop."""

    def __init__(self) -> None:
        self._asked = False

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """The same answer on every rank: True once any of them was asked. A collective."""
        if dist.get_world_size() == 1:
            return self._asked
        flag = torch.tensor([float(self._asked)], device=torch.cuda.current_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Within it the stop signals are noted instead of ending the process."""
    request = StopRequest()
    before = {number: signal.signal(number, request._note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
