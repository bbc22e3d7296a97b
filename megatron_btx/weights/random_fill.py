"""Expressions that are made of nothing: random numbers, and one value everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy
import torch
from torch import Tensor

from megatron_btx.weights.box import Box, Shape, extent, position, slices
from megatron_btx.weights.expression import Expression, Read, Reading, rounded

_DRAW_BLOCK = 1 << 16
"""Elements drawn by one generator. Part of the definition of every draw: never change it."""


@dataclass(frozen=True)
class Draw:
    """Random numbers: normal(0, scale), uniform(-scale, scale), one with probability ``scale`` and
    zero else (``keep``), or one at exactly that share of the places (``subset``).

    One Philox generator per fixed block of elements in row-major order, keyed by seed, name and
    block: any slice of it has the same numbers on every machine and under every layout.
    """

    kind: Literal["normal", "uniform", "keep", "subset"]
    scale: float
    seed: int
    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def parts(self) -> tuple[Expression, ...]:
        """Nothing: it is computed here."""
        return ()

    def evaluate(self, box: Box, read: Read) -> Tensor:
        """The blocks from the box's first element to its last, cut to the box."""
        if self.kind == "subset":
            return rounded(self._subset()[slices(box)], self.dtype)
        start = position(self.shape, tuple(start for start, _ in box))
        last = position(self.shape, tuple(stop - 1 for _, stop in box))
        first = start // _DRAW_BLOCK
        blocks = [self._block(block) for block in range(first, last // _DRAW_BLOCK + 1)]
        flat = torch.from_numpy(numpy.concatenate(blocks))
        strides = tuple(prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        at = start - first * _DRAW_BLOCK
        return rounded(flat.as_strided(extent(box), strides, at), self.dtype)

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

    def _subset(self) -> Tensor:
        """Ones where the smallest of as many uniform numbers lie. All of them are drawn whatever
        the box, so this is for vectors."""
        size = prod(self.shape)
        uniform = replace(self, kind="uniform", shape=(size,), dtype=torch.float64)
        order = uniform.evaluate(((0, size),), _reads_nothing).argsort(stable=True)
        chosen = torch.zeros(size, dtype=torch.float64)
        chosen[order[: round(self.scale * size)]] = 1.0
        return chosen.reshape(self.shape)

    def reads(self, box: Box) -> Iterator[Reading]:
        """Nothing."""
        return iter(())

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
        """Nothing: it is computed here."""
        return ()

    def evaluate(self, box: Box, read: Read) -> Tensor:
        """The value, as often as the box asks."""
        return torch.full(extent(box), self.value, dtype=self.dtype)

    def reads(self, box: Box) -> Iterator[Reading]:
        """Nothing."""
        return iter(())

    def to(self, dtype: torch.dtype) -> Expression:
        """The same value in ``dtype``."""
        return replace(self, dtype=dtype)

    def __str__(self) -> str:
        return f"{self.value:g}"


def _reads_nothing(_source: str, name: str, _box: Box) -> Tensor:
    raise AssertionError(f"a draw reads {name}")
