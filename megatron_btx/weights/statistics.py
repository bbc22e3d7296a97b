"""Scalars of whole tensors as a source: what an expression must know of all elements to make any.

Each is computed when it is first asked for, in a pass of its own over bounded blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from threading import Lock

import numpy
import torch
from torch import Tensor

from megatron_btx.errors import UserError
from megatron_btx.weights.box import Box, Shape, slabs, whole
from megatron_btx.weights.expression import Expression, Read
from megatron_btx.weights.source import Source

_BLOCK = 1 << 20
"""Elements of which a sum is taken at a time. Part of the definition of every moment."""

Compute = Callable[[Expression, Read], Mapping[str, float]]


class Statistics:
    """A source of the scalars ``NAME/KIND`` of every expression ``NAME``.

    Args:
        sources: by label, those that the expressions take from.
        expressions: by name.
        kinds: of scalars.
        compute: (expression, read) -> the scalars by kind.
        dtype: of the scalars.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        expressions: Mapping[str, Expression],
        kinds: tuple[str, ...],
        compute: Compute,
        dtype: torch.dtype,
    ) -> None:
        self._sources, self._expressions = dict(sources), dict(expressions)
        self._kinds, self._compute, self._dtype = kinds, compute, dtype
        self._known: dict[str, Mapping[str, float]] = {}
        self._lock = Lock()
        self._bytes_read = 0

    @property
    def tensors(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        """A scalar for every expression and kind."""
        names = (f"{name}/{kind}" for name in self._expressions for kind in self._kinds)
        return {name: ((), self._dtype) for name in names}

    @property
    def bytes_read(self) -> int:
        """Bytes of scalars; those that they were computed from are the other sources'."""
        return self._bytes_read

    @property
    def stamp(self) -> str:
        """That of what they are computed from."""
        return " ".join(source.stamp for source in self._sources.values())

    def files(self) -> list[Path]:
        """None that the other sources do not name."""
        return []

    def changed(self) -> list[UserError]:
        """Nothing that the other sources do not tell."""
        return []

    def read(self, name: str, box: Box) -> Tensor:
        """One scalar."""
        of, _, kind = name.rpartition("/")
        with self._lock:
            if of not in self._known:
                self._known[of] = self._compute(self._expressions[of], self._read)
            self._bytes_read += self._dtype.itemsize
            return torch.tensor(self._known[of][kind], dtype=self._dtype)

    def _read(self, label: str, name: str, box: Box) -> Tensor:
        return self._sources[label].read(name, box)


def moments(sources: Mapping[str, Source], expressions: Mapping[str, Expression]) -> Statistics:
    """``mean`` and ``std`` (of the population) in fp32: rounded from fp64, so that the order of
    additions does not show."""
    return Statistics(sources, expressions, ("mean", "std"), _moments, torch.float32)


def _moments(expression: Expression, read: Read) -> Mapping[str, float]:
    """In fixed blocks, by numpy, whose sums do not depend on the number of threads."""
    total = squares = 0.0
    for box in slabs(whole(expression.shape), _BLOCK):
        values = expression.evaluate(box, read).double().numpy()
        total += float(values.sum())
        squares += float(numpy.square(values).sum())
    count = prod(expression.shape)
    mean = total / count
    return {"mean": mean, "std": math.sqrt(max(squares / count - mean * mean, 0.0))}


def thresholds(
    sources: Mapping[str, Source], expressions: Mapping[str, Expression], density: float
) -> Statistics:
    """``threshold``: the magnitude that the largest ``density`` of a tensor's elements reach, in
    fp64; at least one element does."""

    def compute(expression: Expression, read: Read) -> Mapping[str, float]:
        count = max(1, round(density * prod(expression.shape)))
        return {"threshold": kth_largest(expression, read, count)}

    return Statistics(sources, expressions, ("threshold",), compute, torch.float64)


def kth_largest(expression: Expression, read: Read, k: int) -> float:
    """The k-th largest magnitude of a tensor, exactly, in bounded memory: magnitudes are ordered as
    their bits are, so four passes find 16 bits of it each."""
    found = 0
    for shift in (48, 32, 16, 0):
        counts = numpy.zeros(1 << 16, dtype=numpy.int64)
        for box in slabs(whole(expression.shape), _BLOCK):
            values = expression.evaluate(box, read).double().abs().numpy()
            bits = values.reshape(-1).view(numpy.uint64)
            if shift < 48:
                bits = bits[(bits >> numpy.uint64(shift + 16)) == numpy.uint64(found)]
            digits = (bits >> numpy.uint64(shift)) & numpy.uint64(0xFFFF)
            counts += numpy.bincount(digits.astype(numpy.int64), minlength=1 << 16)
        larger = counts[::-1].cumsum()[::-1]  # elements whose digit is at least this one
        digit = int(numpy.flatnonzero(larger >= k)[-1])
        k -= int(larger[digit] - counts[digit])
        found = found << 16 | digit
    return float(numpy.array([found], dtype=numpy.uint64).view(numpy.float64)[0])
