"""Expressions that compute: in fp64, a cacheful of elements at a time, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from megatron_btx.weights.box import Box, Shape, extent, slabs
from megatron_btx.weights.expression import Expression, Read, Reading, rounded

_BLOCK = 1 << 22
"""Elements of each part that are read at a time."""

_CACHED = 1 << 16
"""Elements that are computed at a time: an fp64 accumulator that stays in a core's cache is three
times as fast as one that does not."""


@dataclass(frozen=True)
class WeightedSum:
    """``sum_i weights[i] * parts[i] / divisor``, accumulated in fp64, rounded once to ``dtype``.

    fp32 is not enough: the fp32 mean of three equal tensors differs from them in 15% of the
    elements, the fp64 mean rounded once in none.
    """

    parts: tuple[Expression, ...]
    weights: tuple[float, ...]
    divisor: float
    dtype: torch.dtype

    def __post_init__(self) -> None:
        shapes = {part.shape for part in self.parts}
        if len(shapes) != 1 or len(self.parts) != len(self.weights):
            raise ValueError(f"cannot sum shapes {shapes} by {len(self.weights)} weights")

    @property
    def shape(self) -> Shape:
        """That of every part."""
        return self.parts[0].shape

    def evaluate(self, box: Box, read: Read) -> Tensor:
        """Block by block, so that the fp64 accumulator stays small."""

        def weighted(values: list[Tensor]) -> Tensor:
            total = torch.zeros(values[0].shape, dtype=torch.float64)
            for value, weight in zip(values, self.weights, strict=True):
                total.add_(value.double(), alpha=weight)
            return total.div_(self.divisor)

        return _by_block(weighted, self.parts, box, read, self.dtype)

    def reads(self, box: Box) -> Iterator[Reading]:
        """Those of the parts."""
        return _reads(self.parts, box)

    def to(self, dtype: torch.dtype) -> Expression:
        """The same sum, rounded once to ``dtype`` instead."""
        return replace(self, dtype=dtype)

    def __str__(self) -> str:
        terms = (
            str(part) if weight == 1 else f"{weight:g}*{part}"
            for part, weight in zip(self.parts, self.weights, strict=True)
        )
        return f"({' + '.join(terms)})" + ("" if self.divisor == 1 else f"/{self.divisor:g}")


@dataclass(frozen=True)
class Product:
    """``factors[0] * factors[1] * ... / divisors[0] / ...``, in fp64, rounded once.

    Those after the first are broadcast to its shape: a vector scales columns, ``[rows, 1]`` rows.
    """

    factors: tuple[Expression, ...]
    divisors: tuple[Expression, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for part in self.parts:
            ends = zip(reversed(self.shape), reversed(part.shape), strict=False)
            if len(part.shape) > len(self.shape) or any(n not in (1, size) for size, n in ends):
                raise ValueError(f"cannot multiply {self.shape} and {part.shape}")

    @property
    def parts(self) -> tuple[Expression, ...]:
        """What it is made of."""
        return self.factors + self.divisors

    @property
    def shape(self) -> Shape:
        """That of the first factor."""
        return self.factors[0].shape

    def evaluate(self, box: Box, read: Read) -> Tensor:
        """Evaluate ``box`` block by block, as :class:`WeightedSum` does."""

        def multiplied(values: list[Tensor]) -> Tensor:
            total = values[0].double()
            for value in values[1 : len(self.factors)]:
                total = total * value.double()
            for value in values[len(self.factors) :]:
                total = total / value.double()
            return total

        return _by_block(multiplied, self.parts, box, read, self.dtype)

    def reads(self, box: Box) -> Iterator[Reading]:
        """Those of the parts."""
        return _reads(self.parts, box)

    def to(self, dtype: torch.dtype) -> Expression:
        """The same product, rounded once to ``dtype`` instead."""
        return replace(self, dtype=dtype)

    def __str__(self) -> str:
        text = " * ".join(map(str, self.factors))
        return f"({text})" + "".join(f"/{part}" for part in self.divisors)


@dataclass(frozen=True)
class Ties:
    """TIES merging (arXiv 2306.01708, section 3): trim, elect a sign, merge what agrees with it.

    Of each part's difference from ``base`` only elements of at least its threshold are kept; the
    sign of their weighted sum is elected; the result is ``base`` plus the weighted mean of the kept
    differences of that sign, and ``base`` where there is none. In fp64, rounded once to ``dtype``.
    """

    base: Expression
    models: tuple[Expression, ...]
    thresholds: tuple[Expression, ...]
    """Scalars, one a model."""
    weights: tuple[float, ...]
    dtype: torch.dtype

    @property
    def parts(self) -> tuple[Expression, ...]:
        """What it is made of."""
        return (self.base, *self.models, *self.thresholds)

    @property
    def shape(self) -> Shape:
        """That of the base."""
        return self.base.shape

    def evaluate(self, box: Box, read: Read) -> Tensor:
        """Evaluate ``box`` block by block, as :class:`WeightedSum` does."""
        count = len(self.models)

        def merged(values: list[Tensor]) -> Tensor:
            base = values[0].double()
            kept = []
            for value, threshold in zip(values[1 : 1 + count], values[1 + count :], strict=True):
                moved = value.double() - base
                kept.append(moved.where(moved.abs() >= threshold, 0.0))
            total, agreeing, mass = (torch.zeros_like(base) for _ in range(3))
            weighted = [weight * moved for weight, moved in zip(self.weights, kept, strict=True)]
            for each in weighted:
                total += each
            for each, weight in zip(weighted, self.weights, strict=True):
                agrees = each * total > 0
                agreeing += each.where(agrees, 0.0)
                mass += weight * agrees
            return base + agreeing / mass.where(mass > 0, 1.0)

        return _by_block(merged, self.parts, box, read, self.dtype)

    def reads(self, box: Box) -> Iterator[Reading]:
        """Those of the parts."""
        return _reads(self.parts, box)

    def to(self, dtype: torch.dtype) -> Expression:
        """The same, rounded once to ``dtype`` instead."""
        return replace(self, dtype=dtype)

    def __str__(self) -> str:
        terms = zip(self.weights, self.models, self.thresholds, strict=True)
        return f"ties({self.base}; {', '.join(f'{w:g}*{x} over {t}' for w, x, t in terms)})"


def _by_block(
    compute: Callable[[list[Tensor]], Tensor],
    parts: Sequence[Expression],
    box: Box,
    read: Read,
    dtype: torch.dtype,
) -> Tensor:
    """``compute`` of the parts' values, a cacheful of elements at a time, rounded to ``dtype``."""
    out = torch.empty(extent(box), dtype=dtype)
    flat, at = out.view(-1), 0
    for block in slabs(box, _BLOCK):
        size, values = extent(block), []
        for part in parts:
            value = part.evaluate(_within(block, part.shape), read)
            values.append(value.expand(size).reshape(-1))
        for start in range(0, prod(size), _CACHED):
            piece = compute([value[start : start + _CACHED] for value in values])
            flat[at : at + len(piece)] = rounded(piece, dtype)
            at += len(piece)
    return out


def _reads(parts: Sequence[Expression], box: Box) -> Iterator[Reading]:
    for part in parts:
        yield from part.reads(_within(box, part.shape))


def _within(box: Box, shape: Shape) -> Box:
    """What a box takes of a tensor that is broadcast."""
    last = box[len(box) - len(shape) :]
    return tuple((0, 1) if size == 1 else ends for ends, size in zip(last, shape, strict=True))
