"""What a target tensor is made of, as data.

An expression knows its shape and dtype without touching a tensor, can be printed, compared and
hashed, and evaluates any box of itself by reading only the boxes of the sources that it needs.
There are nine; everything else (``build.stack``, ``mean``, ``scaled``, ...) is made of them.

Rounding: averages accumulate in fp64 and are rounded once, to the dtype asked for.
Randomness: a value depends on (seed, name, position) alone, never on the box it is read through.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy
import torch
from torch import Tensor

from megatron_btx.weights.box import (
    Box,
    Shape,
    contiguous,
    extent,
    position,
    runs,
    shifted,
    slabs,
    slices,
)

Read = Callable[[str, str, Box], Tensor]
"""(source, tensor name, box) -> the box's elements; the result is never written to."""

_BLOCK = 1 << 22
"""Elements of each part that are read at a time."""

_CACHED = 1 << 16
"""Elements that are computed at a time: an fp64 accumulator that stays in a core's cache is three
times as fast as one that does not."""

_DRAW_BLOCK = 1 << 16
"""Elements drawn by one generator. Part of the definition of every draw: never change it."""


@dataclass(frozen=True)
class Take:
    """A tensor of a source."""

    source: str
    name: str
    shape: Shape
    dtype: torch.dtype

    def evaluate(self, box: Box, read: Read) -> Tensor:
        """The elements of ``box``, as they lie in the source."""
        return read(self.source, self.name, box)

    def to(self, dtype: torch.dtype) -> Expression:
        """The same values in ``dtype``."""
        return self if dtype == self.dtype else Cast(self, dtype)

    @property
    def parts(self) -> tuple[Expression, ...]:
        """What it is made of."""
        return ()

    def __str__(self) -> str:
        return f"{self.source}:{self.name}"


@dataclass(frozen=True)
class Slice:
    """A box of another expression."""

    of: Expression
    box: Box

    @property
    def shape(self) -> Shape:
        """The box's extent."""
        return extent(self.box)

    @property
    def dtype(self) -> torch.dtype:
        """That of what is sliced."""
        return self.of.dtype

    @property
    def parts(self) -> tuple[Expression, ...]:
        """What it is made of."""
        return (self.of,)

    def evaluate(self, box: Box, read: Read) -> Tensor:
        """A box of a box is a box."""
        return self.of.evaluate(shifted(box, tuple(start for start, _ in self.box)), read)

    def to(self, dtype: torch.dtype) -> Expression:
        """The same values in ``dtype``."""
        return replace(self, of=self.of.to(dtype))

    def __str__(self) -> str:
        ranges = (
            ":" if (a, b) == (0, size) else f"{a}:{b}"
            for (a, b), size in zip(self.box, self.of.shape, strict=True)
        )
        return f"{self.of}[{', '.join(ranges)}]"


@dataclass(frozen=True)
class Cat:
    """Expressions side by side along ``dim``."""

    parts: tuple[Expression, ...]
    dim: int = 0

    def __post_init__(self) -> None:
        rest = {_without(part.shape, self.dim) for part in self.parts}
        kinds = {part.dtype for part in self.parts}
        if len(rest) != 1 or len(kinds) != 1:
            raise ValueError(f"cannot concatenate shapes {rest} of dtypes {kinds}")

    @property
    def shape(self) -> Shape:
        """That of the parts, summed along ``dim``."""
        first = self.parts[0].shape
        size = sum(part.shape[self.dim] for part in self.parts)
        return (*first[: self.dim], size, *first[self.dim + 1 :])

    @property
    def dtype(self) -> torch.dtype:
        """That of every part."""
        return self.parts[0].dtype

    def evaluate(self, box: Box, read: Read) -> Tensor:
        """Only the parts that the box meets; one part alone is passed through uncopied."""
        found, offset = [], 0
        for part in self.parts:
            size = part.shape[self.dim]
            start, stop = (max(end - offset, 0) for end in box[self.dim])
            if start < min(stop, size):
                inner = (*box[: self.dim], (start, min(stop, size)), *box[self.dim + 1 :])
                found.append(part.evaluate(inner, read))
            offset += size
        return found[0] if len(found) == 1 else torch.cat(found, self.dim)

    def to(self, dtype: torch.dtype) -> Expression:
        """The same values in ``dtype``."""
        return replace(self, parts=tuple(part.to(dtype) for part in self.parts))

    def __str__(self) -> str:
        return f"cat{self.dim}({', '.join(map(str, self.parts))})"


@dataclass(frozen=True)
class Reshape:
    """The same elements in row-major order under another shape."""

    of: Expression
    shape: Shape

    def __post_init__(self) -> None:
        if prod(self.of.shape) != prod(self.shape):
            raise ValueError(f"cannot view {self.of.shape} as {self.shape}")

    @property
    def dtype(self) -> torch.dtype:
        """That of what is viewed."""
        return self.of.dtype

    @property
    def parts(self) -> tuple[Expression, ...]:
        """What it is made of."""
        return (self.of,)

    def evaluate(self, box: Box, read: Read) -> Tensor:
        """Dimensions that both shapes share at either end pass through; between them each
        contiguous run of the new shape is gathered from the boxes that hold it in the old one."""
        head, tail = _shared(self.of.shape, self.shape)
        old = self.of.shape[head : len(self.of.shape) - tail]
        new = self.shape[head : len(self.shape) - tail]
        before, middle, after = box[:head], box[head : head + len(new)], box[head + len(new) :]

        found = []
        for start, stop, where in contiguous(new, middle):
            pieces = [
                self.of.evaluate((*before, *inner, *after), read).reshape(
                    *extent(before), -1, *extent(after)
                )
                for inner in runs(old, start, stop)
            ]
            piece = pieces[0] if len(pieces) == 1 else torch.cat(pieces, head)
            found.append((where, piece.reshape(*extent(before), *extent(where), *extent(after))))
        if len(found) == 1:
            return found[0][1]
        out = torch.empty(extent(box), dtype=self.dtype)
        for where, piece in found:
            out[slices((*before, *where, *after), box)] = piece
        return out

    def to(self, dtype: torch.dtype) -> Expression:
        """The same values in ``dtype``."""
        return replace(self, of=self.of.to(dtype))

    def __str__(self) -> str:
        return f"{self.of}.view({', '.join(map(str, self.shape))})"


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
    """``parts[0] * parts[1] * ... / divisors[0] / ...`` element by element, in fp64, rounded once.

    Parts and divisors after the first may lack leading dimensions: a vector scales columns.
    """

    factors: tuple[Expression, ...]
    divisors: tuple[Expression, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for part in self.parts:
            if part.shape != self.shape[len(self.shape) - len(part.shape) :]:
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
        """Block by block, as sums are."""

        def multiplied(values: list[Tensor]) -> Tensor:
            total = values[0].double()
            for value in values[1 : len(self.factors)]:
                total = total * value.double()
            for value in values[len(self.factors) :]:
                total = total / value.double()
            return total

        return _by_block(multiplied, self.parts, box, read, self.dtype)

    def to(self, dtype: torch.dtype) -> Expression:
        """The same product, rounded once to ``dtype`` instead."""
        return replace(self, dtype=dtype)

    def __str__(self) -> str:
        text = " * ".join(map(str, self.factors))
        return f"({text})" + "".join(f"/{part}" for part in self.divisors)


@dataclass(frozen=True)
class Cast:
    """Another expression rounded to ``dtype``."""

    of: Expression
    dtype: torch.dtype

    @property
    def shape(self) -> Shape:
        """That of what is cast."""
        return self.of.shape

    @property
    def parts(self) -> tuple[Expression, ...]:
        """What it is made of."""
        return (self.of,)

    def evaluate(self, box: Box, read: Read) -> Tensor:
        """The box in the other dtype."""
        return self.of.evaluate(box, read).to(self.dtype)

    def to(self, dtype: torch.dtype) -> Expression:
        """The original rounded to ``dtype``: one rounding, not two."""
        return self.of.to(dtype)

    def __str__(self) -> str:
        return f"{self.of} as {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Draw:
    """Random numbers: normal(0, scale), uniform(-scale, scale), or one with probability ``scale``
    and zero else (``keep``).

    One Philox generator per fixed block of elements in row-major order, keyed by seed, name and
    block: whoever draws any slice of it, on whatever machine and layout, draws the same numbers.
    """

    kind: Literal["normal", "uniform", "keep"]
    scale: float
    seed: int
    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def parts(self) -> tuple[Expression, ...]:
        """Nothing: it is born here."""
        return ()

    def evaluate(self, box: Box, read: Read) -> Tensor:
        """The blocks from the box's first element to its last, cut to the box."""
        start = position(self.shape, tuple(start for start, _ in box))
        last = position(self.shape, tuple(stop - 1 for _, stop in box))
        first = start // _DRAW_BLOCK
        blocks = [self._block(block) for block in range(first, last // _DRAW_BLOCK + 1)]
        flat = torch.from_numpy(numpy.concatenate(blocks))
        strides = tuple(prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        at = start - first * _DRAW_BLOCK
        return flat.as_strided(extent(box), strides, at).to(self.dtype)

    def _block(self, block: int) -> numpy.ndarray:
        key = hashlib.sha256(f"{self.seed}/{self.name}/{block}".encode()).digest()
        generator = numpy.random.Generator(
            numpy.random.Philox(key=int.from_bytes(key[:16], "little"))
        )
        if self.kind == "normal":
            return generator.standard_normal(_DRAW_BLOCK) * self.scale
        if self.kind == "uniform":
            return (generator.random(_DRAW_BLOCK) * 2 - 1) * self.scale
        return (generator.random(_DRAW_BLOCK) < self.scale).astype(numpy.float64)

    def to(self, dtype: torch.dtype) -> Expression:
        """The same draw, rounded once to ``dtype`` instead."""
        return replace(self, dtype=dtype)

    def __str__(self) -> str:
        return f"{self.kind}({self.scale:g}, seed {self.seed}: {self.name})"


@dataclass(frozen=True)
class Fill:
    """One value everywhere."""

    value: float
    shape: Shape
    dtype: torch.dtype

    @property
    def parts(self) -> tuple[Expression, ...]:
        """Nothing: it is born here."""
        return ()

    def evaluate(self, box: Box, read: Read) -> Tensor:
        """The value, as often as the box asks."""
        return torch.full(extent(box), self.value, dtype=self.dtype)

    def to(self, dtype: torch.dtype) -> Expression:
        """The same value in ``dtype``."""
        return replace(self, dtype=dtype)

    def __str__(self) -> str:
        return f"{self.value:g}"


Expression = Take | Slice | Cat | Reshape | WeightedSum | Product | Cast | Draw | Fill


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
            value = part.evaluate(block[len(block) - len(part.shape) :], read)
            values.append(value.expand(size).reshape(-1))
        for start in range(0, prod(size), _CACHED):
            piece = compute([value[start : start + _CACHED] for value in values])
            flat[at : at + len(piece)] = piece
            at += len(piece)
    return out


def _without(shape: Shape, dim: int) -> Shape:
    return (*shape[:dim], *shape[dim + 1 :])


def _shared(one: Shape, other: Shape) -> tuple[int, int]:
    """How many leading, then trailing, dimensions two shapes have in common."""
    limit = min(len(one), len(other))
    head = 0
    while head < limit and one[head] == other[head]:
        head += 1
    tail = 0
    while tail < limit - head and one[-1 - tail] == other[-1 - tail]:
        tail += 1
    return head, tail
