"""How long a rank waits for others. What is left of a step is its own work: every rank of a
synchronous step takes the same time, and only the slowest one does not wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist


@dataclass(slots=True)
class Waiting:
    """Seconds in which this process waited for collective operations."""

    seconds: float = 0.0


@contextmanager
def counted() -> Iterator[Waiting]:
    """Count within the block. Whatever blocks on gloo goes through ``Work.wait``: collectives,
    coalesced or not, and what pipeline stages send each other. On a GPU it only queues a wait and
    returns at once, so that nothing is counted there."""
    found, plain = Waiting(), dist.Work.wait

    def wait(work: dist.Work, *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return plain(work, *arguments, **options)
        finally:
            found.seconds += time.perf_counter() - started

    with mock.patch.object(dist.Work, "wait", wait):
        yield found
