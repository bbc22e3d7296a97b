"""What a target tensor is made of, as data.

An expression knows its shape and dtype without touching a tensor, can be printed, compared and
hashed, and evaluates any box of itself by reading only the boxes of the sources that it needs.
There are nine; everything else (``build.stack``, ``mean``, ``scaled``, ...) is made of them.

Rounding: averages accumulate in fp64 and are rounded once, to the dtype asked for.
Randomness: a value depends on (seed, name, position) alone, never on the box it is read through.
"""

from __future__ import annotations

from megatron_btx.weights.arithmetic import Product, WeightedSum
from megatron_btx.weights.arrange import Cast, Cat, Read, Reshape, Slice, Take
from megatron_btx.weights.random_fill import Draw, Fill

Expression = Take | Slice | Cat | Reshape | WeightedSum | Product | Cast | Draw | Fill

__all__ = [
    "Cast",
    "Cat",
    "Draw",
    "Expression",
    "Fill",
    "Product",
    "Read",
    "Reshape",
    "Slice",
    "Take",
    "WeightedSum",
]
