"""Expressions made of expressions, in their simplest form; and what can be asked of one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod

import torch

from megatron_btx.weights.arithmetic import Product, Ties, WeightedSum
from megatron_btx.weights.arrange import Cast, Cat, Reshape, Slice, Take
from megatron_btx.weights.box import Shape, whole
from megatron_btx.weights.expression import Expression


def rows(of: Expression, start: int, stop: int, dim: int = 0) -> Expression:
    """``of[start:stop]`` along ``dim``, in its simplest form."""
    size = of.shape[dim]
    if not 0 <= start < stop <= size:
        raise ValueError(f"{start}:{stop} is outside dimension {dim} of {of.shape}")
    if stop - start == size:
        return of
    match of:
        case WeightedSum():
            return replace(of, parts=tuple(rows(part, start, stop, dim) for part in of.parts))
        case Cast():
            return replace(of, of=rows(of.of, start, stop, dim))
        case Cat() if of.dim == dim:
            offset = 0
            for part in of.parts:
                if offset <= start and stop <= offset + part.shape[dim]:
                    return rows(part, start - offset, stop - offset, dim)
                offset += part.shape[dim]
    box = whole(of.shape)
    return Slice(of, (*box[:dim], (start, stop), *box[dim + 1 :]))


def reshape(of: Expression, shape: Shape) -> Expression:
    """``of`` viewed as ``shape``, in its simplest form."""
    if of.shape == shape:
        return of
    match of:
        case Reshape():
            return reshape(of.of, shape)
        case WeightedSum():
            return replace(of, parts=tuple(reshape(part, shape) for part in of.parts))
        case Cast():
            return replace(of, of=reshape(of.of, shape))
    return Reshape(of, shape)


def item(of: Expression, index: int) -> Expression:
    """``of[index]``: one element along the first dimension, which disappears."""
    return reshape(rows(of, index, index + 1), of.shape[1:])


def cat(parts: Sequence[Expression], dim: int = 0) -> Expression:
    """Expressions side by side along ``dim``; of several dtypes, in the one that holds the values
    of all of them (``torch.promote_types``), so that nothing is rounded."""
    common = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    return Cat(tuple(part.to(common) for part in parts), dim)


def stack(parts: Sequence[Expression]) -> Expression:
    """Expressions of one shape along a new first dimension, of dtypes as :func:`cat`."""
    return cat([reshape(part, (1, *part.shape)) for part in parts])


def mean(
    parts: Sequence[Expression], dtype: torch.dtype, weights: Sequence[float] | None = None
) -> Expression:
    """The average: uniform, or by ``weights`` that need not sum to one."""
    if weights is None:
        weights = [1.0] * len(parts)
    return WeightedSum(tuple(parts), tuple(map(float, weights)), float(sum(weights)), dtype)


def scaled(of: Expression, factor: float) -> Expression:
    """``factor * of`` in the dtype of ``of``."""
    return WeightedSum((of,), (float(factor),), 1.0, of.dtype)


def rebuilt(of: Expression, leaf: Callable[[Take], Expression]) -> Expression:
    """``of`` with every take replaced, in its simplest form again."""
    match of:
        case Take():
            return leaf(of)
        case Slice():
            made = rebuilt(of.of, leaf)
            for dim, (start, stop) in enumerate(of.box):
                made = rows(made, start, stop, dim)
            return made
        case Reshape():
            return reshape(rebuilt(of.of, leaf), of.shape)
        case Cast():
            return replace(of, of=rebuilt(of.of, leaf))
        case Cat() | WeightedSum():
            return replace(of, parts=tuple(rebuilt(part, leaf) for part in of.parts))
        case Product():
            return replace(
                of,
                factors=tuple(rebuilt(part, leaf) for part in of.factors),
                divisors=tuple(rebuilt(part, leaf) for part in of.divisors),
            )
        case Ties():
            return replace(
                of,
                base=rebuilt(of.base, leaf),
                models=tuple(rebuilt(part, leaf) for part in of.models),
                thresholds=tuple(rebuilt(part, leaf) for part in of.thresholds),
            )
    return of


def takes(of: Expression) -> Iterator[Take]:
    """Every tensor of a source that an expression reads."""
    if isinstance(of, Take):
        yield of
    for part in of.parts:
        yield from takes(part)


def nbytes(of: Expression) -> int:
    """Bytes of the whole result."""
    return prod(of.shape) * of.dtype.itemsize
