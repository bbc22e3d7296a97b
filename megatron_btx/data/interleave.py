"""Several sequences woven into one in proportion, without ever writing the order down."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


class Interleaved:
    """All elements of sequences of the given ``sizes``, each sequence spread evenly over the whole.

    Element j of a sequence of n stands at (j + 1/2) / n; ties go to the first sequence. Any place
    is found in a few steps of arithmetic: a run of 500 billion tokens has 10^8 samples, and an
    array of their order on every rank would be a gigabyte.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self._length = sum(self.sizes)

    def __len__(self) -> int:
        return self._length

    def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Which sequence, and which element of it, the places ``first``, ``first + 1``, ... hold.

        Returns:
            Two int64 arrays [count].
        """
        assert first >= 0
        assert first + count <= self._length
        # Before position t stand n t elements of each sequence, give or take one.
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
