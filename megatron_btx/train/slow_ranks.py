"""Ranks that hold the others up, named: their own work a step, beside that of the median rank.

A synchronous step takes every rank the same time; what differs is how much of it a rank works and
how much it waits for others (throughput.py). On GPUs that is not measured: the host does not
wait there.
"""

from __future__ import annotations

import logging
import socket
import statistics
from collections import deque
from typing import Any

import torch
import torch.distributed as dist

from megatron_btx.train.loop import Callback, Run
from megatron_btx.train.summary import slow_in_words

logger = logging.getLogger(__name__)

EVERY = 10
"""Steps after which the ranks are compared."""
OVER = 3 * EVERY
"""The last steps, of which each rank's median is taken: a rank that something else on its machine
holds up for fewer than half of them is not named. None is before there are as many."""
SLOW = 1.5
"""A rank is slow that works so many times as long as the median rank. Stages of a pipeline differ
by design, ranks of a busy machine by chance; both stay below."""
_WORTH = 0.1
"""Of the longest work of all: a smaller excess over the median rank's is not worth a name."""

WORK = "time_metrics/work(s)"


class SlowRanks(Callback):
    """Adds to every tenth step's record ``time_metrics/rank_work_{median,max}(s)`` and
    ``slow_ranks``: by ``RANK@HOST`` the multiple of the median. Before the log in the list."""

    def __init__(self) -> None:
        self._own: deque[float] = deque(maxlen=OVER)
        self._hosts: list[str] = []
        self._said: set[str] = set()

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        """Compare the ranks, where it is time to."""
        if torch.cuda.is_available() or dist.get_world_size() == 1:
            return
        self._own.append(record[WORK])
        if run.step % EVERY == 0:
            every = self._all_ranks(statistics.median(self._own))
            record |= compared(every, self._hosts, steps=len(self._own))
            self._tell(run.step, record["slow_ranks"])

    def _all_ranks(self, own: float) -> list[float]:
        """This rank's number, and those of all others."""
        if not self._hosts:
            self._hosts = [""] * dist.get_world_size()
            dist.all_gather_object(self._hosts, socket.gethostname())
        every = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        every[dist.get_rank()] = own
        dist.all_reduce(every)
        values: list[float] = every.tolist()
        return values

    def _tell(self, step: int, slow: dict[str, float]) -> None:
        if dist.get_rank() == 0 and slow.keys() - self._said:
            logger.warning("step %d: %s", step, slow_in_words(slow))
        self._said = set(slow)


def compared(every: list[float], hosts: list[str], *, steps: int = OVER) -> dict[str, Any]:
    """What is logged of the ranks' own seconds a step.

    Args:
        every: by rank.
        hosts: by rank.
        steps: of which these are the medians.
    """
    # The lower of two: of two ranks one can be named.
    median = statistics.median_low(every)
    slow = {
        f"{rank}@{host}": round(own / median, 3)
        for rank, (own, host) in enumerate(zip(every, hosts, strict=True))
        if steps == OVER and own > SLOW * median and own - median > _WORTH * max(every)
    }
    return {
        "time_metrics/rank_work_median(s)": median,
        "time_metrics/rank_work_max(s)": max(every),
        "slow_ranks": slow,
    }
