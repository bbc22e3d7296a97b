"""What a target tensor is made of, as data.

An expression knows its shape and dtype without touching a tensor, can be printed, compared and
hashed, and evaluates any box of itself by reading only the boxes of the sources that it needs.
There are ten: Take, Slice, Cat, Reshape and Cast (arrange.py), WeightedSum, Product and Ties
(arithmetic.py), Draw and Fill (random_fill.py); everything else (``ops.stack``, ``mean``, ...) is
made of them.

Rounding: averages accumulate in fp64 and are rounded once, to the dtype asked for (``rounded``).
Randomness: a value depends on (seed, name, position) alone, never on the box it is read through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy
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


_BETWEEN = {torch.bfloat16: (0x8000, 0xFFFF), torch.float16: (0, 0x0FFF)}
"""Pattern and mask of the last bits of every fp32 number that lies halfway between two neighbours
of these (of fp16's subnormal numbers too)."""


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values.to(dtype)``, to the nearest number, ties to even, also from fp64 to 16 bits.

    torch goes through fp32 there and rounds twice: what fp32 has rounded to halfway between two
    neighbours then goes to the even one, on whichever side of them it was (18 of two million normal
    numbers in bf16, 106 in fp16). Those are moved to fp32's next number on their own side before.
    """
    if values.dtype != torch.float64 or dtype not in _BETWEEN:
        return values.to(dtype)
    values = values.contiguous()
    single = values.float()
    exact, flat = values.view(-1).numpy(), single.view(-1).numpy()
    pattern, mask = _BETWEEN[dtype]
    halves = (flat.view(numpy.int32) & mask) == pattern
    halves &= flat != exact
    if halves.any():
        at, inf = numpy.flatnonzero(halves), numpy.float32(numpy.inf)
        near = flat[at]
        side = numpy.where(exact[at] > near, inf, numpy.where(exact[at] < near, -inf, near))
        flat[at] = numpy.nextafter(near, side)
    return single.to(dtype)
