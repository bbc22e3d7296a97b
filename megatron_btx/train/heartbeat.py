"""How a rank says that it gets on. Imports no torch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Heartbeat:
    """The last sign of this process's training."""

    step: int | None = None
    """Optimizer steps done; ``None`` before the first."""
    time: float = field(default_factory=time.monotonic)

    def beat(self, step: int) -> None:
        """A step has been done."""
        self.step, self.time = step, time.monotonic()

    def begin(self) -> None:
        """Nothing has been done yet, from now on."""
        self.step, self.time = None, time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since the last sign."""
        return time.monotonic() - self.time


HEART = Heartbeat()
"""This process's: it trains one model at a time."""
