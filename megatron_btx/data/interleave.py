"""Several sequences interleaved in proportion to their sizes, without storing the order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


class Interleaved:
    """All elements of sequences of the given ``sizes``, each sequence spread evenly over the whole.

    Element j of a sequence of n elements has the position (j + 1/2) / n; of equal positions the
    first sequence's comes first. Positions are computed, not stored: a run of 500 billion tokens
    has 10^8 samples, and an array of their order would take a gigabyte on every rank.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self._length = sum(self.sizes)

    def __len__(self) -> int:
        return self._length

    def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The sequence, and the element of it, at the places ``first``, ``first + 1``, ...

        Args:
            first: a place, from 0.
            count: how many.

        Returns:
            Two int64 arrays [count]: sequences and elements.
        """
        assert first >= 0
        assert first + count <= self._length
        # About n t elements of each sequence have a position below t; the margin covers rounding.
        margin = len(self.sizes) + 1
        begin, end = (first - margin) / self._length, (first + count + margin) / self._length
        lows, keys, sequences = [], [], []
        for sequence, size in enumerate(self.sizes):
            low = max(0, math.floor(begin * size) - 1)
            high = min(size, math.ceil(end * size) + 1)
            lows.append(low)
            keys.append((np.arange(low, high) + 0.5) / max(size, 1))
            sequences.append(np.full(high - low, sequence))
        elements = np.concatenate(
            [low + np.arange(len(k)) for low, k in zip(lows, keys, strict=True)]
        )
        order = np.argsort(np.concatenate(keys), kind="stable")
        chosen = order[first - sum(lows) :][:count]
        return np.concatenate(sequences)[chosen], elements[chosen]
