"""What a target tensor is made of, as data.

An expression knows its shape and dtype without touching a tensor, can be printed, compared and
hashed, and evaluates any box of itself by reading only the boxes of the sources that it needs.
There are ten: Take, Slice, Cat, Reshape and Cast (arrange.py), WeightedSum, Product and Ties
(arithmetic.py), Draw and Fill (random_fill.py); everything else (``ops.stack``, ``mean``, ...) is
made of them.

Rounding: averages accumulate in fp64 and are rounded once, to the dtype asked for.
Randomness: a value depends on (seed, name, position) alone, never on the box it is read through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from megatron_btx.weights.box import Box, Shape

Read = Callable[[str, str, Box], Tensor]
"""(source, tensor name, box) -> the box's elements; the result is never written to."""

Reading = tuple[str, str, Box]
"""What :data:`Read` is asked."""


class Expression(Protocol):
    """What each of the ten classes is. All are frozen dataclasses: compared and hashed by value,
    and ``str()`` tells what they compute (a plan's hash is made of it)."""

    @property
    def shape(self) -> Shape:
        """Of the whole tensor."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        ...

    @property
    def parts(self) -> tuple[Expression, ...]:
        """The expressions that it is made of."""
        ...

    def evaluate(self, box: Box, read: Read) -> Tensor:
        """The elements of ``box`` (half-open ranges, one a dimension), of the box's extent."""
        ...

    def reads(self, box: Box) -> Iterator[Reading]:
        """The boxes that :meth:`evaluate` reads, up to the blocks in which it does."""
        ...

    def to(self, dtype: torch.dtype) -> Expression:
        """The same values in ``dtype``, rounded once."""
        ...
