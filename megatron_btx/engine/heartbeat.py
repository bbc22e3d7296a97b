"""The last sign of progress of this process, for the watchdog. Imports no torch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Heartbeat:
    """The last sign of this process's work."""

    last: str = ""
    """What was done: ``step 12``, ``micro-batch 3 of math``; empty before the first."""
    time: float = field(default_factory=time.monotonic)

    def beat(self, what: str) -> None:
        """Something has been done."""
        self.last, self.time = what, time.monotonic()

    def begin(self) -> None:
        """Nothing has been done yet, from now on."""
        self.beat("")

    @property
    def silence(self) -> float:
        """Seconds since the last sign."""
        return time.monotonic() - self.time


HEART = Heartbeat()
"""This process's: it works at one model at a time."""
