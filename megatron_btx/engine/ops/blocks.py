"""Rows a few at a time.

A chain of small operations over a large matrix reads it from memory and writes it back once an
operation. Over a block of its rows that stays in a core's cache it does so once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ELEMENTS = 1 << 17
"""Of a block, for every thread: half a megabyte in fp32, of which some three are live. Much
smaller, and torch does not share an operation between threads."""


def blocks(x: Tensor) -> Iterator[slice]:
    """Runs of rows of a matrix that fit into a CPU's caches together; on a GPU all rows at once."""
    rows = len(x)
    step = max(1, rows)
    if x.device.type == "cpu":
        step = max(1, ELEMENTS * torch.get_num_threads() // x.shape[1])
    for first in range(0, rows, step):
        yield slice(first, first + step)
