"""Expressions that pick and arrange: no number is computed here, a cast aside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from megatron_btx.weights.box import Box, Shape, contiguous, extent, runs, shifted, slices
from megatron_btx.weights.expression import Expression, Read, Reading, rounded


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

    def reads(self, box: Box) -> Iterator[Reading]:
        """The box itself."""
        yield self.source, self.name, box

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
        return self.of.evaluate(self._below(box), read)

    def reads(self, box: Box) -> Iterator[Reading]:
        """Those of that box."""
        return self.of.reads(self._below(box))

    def _below(self, box: Box) -> Box:
        return shifted(box, tuple(start for start, _ in self.box))

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
        flat = any(len(part.shape) <= self.dim for part in self.parts)
        if flat or len(rest) != 1 or len(kinds) != 1:
            shapes = sorted({part.shape for part in self.parts})
            raise ValueError(f"cannot concatenate shapes {shapes} of dtypes {kinds}")

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
        found = [part.evaluate(inner, read) for part, inner in self._met(box)]
        return found[0] if len(found) == 1 else torch.cat(found, self.dim)

    def reads(self, box: Box) -> Iterator[Reading]:
        """Those of the parts that the box meets."""
        for part, inner in self._met(box):
            yield from part.reads(inner)

    def _met(self, box: Box) -> Iterator[tuple[Expression, Box]]:
        """The parts that a box meets, and what it takes of each."""
        offset = 0
        for part in self.parts:
            size = part.shape[self.dim]
            start, stop = (max(end - offset, 0) for end in box[self.dim])
            if start < min(stop, size):
                yield part, (*box[: self.dim], (start, min(stop, size)), *box[self.dim + 1 :])
            offset += size

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
        before, after = extent(box[:head]), extent(box[len(box) - tail :])
        found = []
        for where, held in self._gathered(box):
            pieces = [self.of.evaluate(old, read).reshape(*before, -1, *after) for old in held]
            piece = pieces[0] if len(pieces) == 1 else torch.cat(pieces, head)
            found.append((where, piece.reshape(extent(where))))
        if len(found) == 1:
            return found[0][1]
        out = torch.empty(extent(box), dtype=self.dtype)
        for where, piece in found:
            out[slices(where, box)] = piece
        return out

    def reads(self, box: Box) -> Iterator[Reading]:
        """Those of the boxes that hold it in the old shape."""
        for _, held in self._gathered(box):
            for old in held:
                yield from self.of.reads(old)

    def _gathered(self, box: Box) -> Iterator[tuple[Box, list[Box]]]:
        """The parts of a box, and the boxes that hold each in the old shape."""
        head, tail = _shared(self.of.shape, self.shape)
        old = self.of.shape[head : len(self.of.shape) - tail]
        new = self.shape[head : len(self.shape) - tail]
        before, middle, after = box[:head], box[head : head + len(new)], box[head + len(new) :]
        for start, stop, where in contiguous(new, middle):
            held = [(*before, *inner, *after) for inner in runs(old, start, stop)]
            yield (*before, *where, *after), held

    def to(self, dtype: torch.dtype) -> Expression:
        """The same values in ``dtype``."""
        return replace(self, of=self.of.to(dtype))

    def __str__(self) -> str:
        return f"{self.of}.view({', '.join(map(str, self.shape))})"


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
        return rounded(self.of.evaluate(box, read), self.dtype)

    def reads(self, box: Box) -> Iterator[Reading]:
        """Those of what is cast."""
        return self.of.reads(box)

    def to(self, dtype: torch.dtype) -> Expression:
        """The original rounded to ``dtype``: one rounding, not two."""
        return self.of.to(dtype)

    def __str__(self) -> str:
        return f"{self.of} as {str(self.dtype).removeprefix('torch.')}"


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
