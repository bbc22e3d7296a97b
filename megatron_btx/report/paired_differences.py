"""Differences of two systems under the same random seeds, and what they say. Imports no torch."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Paired:
    """Differences of one number between two systems, each under one random seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the differences."""
        return statistics.fmean(self.values)

    @property
    def stdev(self) -> float | None:
        """The sample standard deviation; ``None`` of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's 95% confidence interval of the mean: mean ± t s / sqrt(n), t of n - 1 degrees
        of freedom. ``None`` of a single one."""
        if self.stdev is None:
            return None
        count = len(self.values)
        half = student_t(count - 1) * self.stdev / math.sqrt(count)
        return self.mean - half, self.mean + half

    @property
    def open(self) -> bool:
        """Whether the interval holds 0: other random seeds may well turn the two around."""
        return self.interval is not None and self.interval[0] <= 0 <= self.interval[1]


def student_t(degrees: int) -> float:
    """The t that Student's distribution of so many degrees of freedom exceeds in absolute value in
    5% of the cases: 12.706 of 1, 4.303 of 2, 1.960 of very many."""
    low, high = 0.0, 16.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, degrees) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def _inside(t: float, degrees: int) -> float:
    """P(-t < T < t): Abramowitz and Stegun, 26.7.3 (odd) and 26.7.4 (even degrees of freedom)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for k in range(odd, degrees - 1, 2):
        total += term
        term *= square * (k + 1) / (k + 2)
    return (2 / math.pi) * (angle + sine * total) if odd else sine * total
