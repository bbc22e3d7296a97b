"""Index arithmetic: which elements of a tensor, as half-open ranges per dimension.

Everything here is on plain integers, so a plan can be checked and counted without a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from math import prod

from megatron_btx.errors import shown

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]
"""One ``(start, stop)`` per dimension; never empty."""


def told(value: object) -> str:
    """A value from a pickle as errors show it: of what holds others, and perhaps itself, the type
    alone."""
    holds = isinstance(value, (list, tuple, dict, set, frozenset))
    return f"a {type(value).__name__}" if holds else shown(value)


def sizes(values: Iterable[object]) -> Shape:
    """Values from a file as sizes: whole numbers from zero on, and nothing else.

    Raises:
        ValueError: something else is among them.
    """
    given = tuple(values)
    found = tuple(value for value in given if type(value) is int and 0 <= value < 1 << 60)
    if len(found) < len(given):
        some = ", ".join(map(told, given[:8])) + (", ..." if len(given) > 8 else "")
        raise ValueError(f"({some}): not sizes")
    return found


def whole(shape: Shape) -> Box:
    """The box of a whole tensor."""
    return tuple((0, size) for size in shape)


def extent(box: Box) -> Shape:
    """The shape of what a box holds."""
    return tuple(stop - start for start, stop in box)


def shifted(box: Box, offsets: Shape) -> Box:
    """``box`` moved by ``offsets``."""
    return tuple((start + by, stop + by) for (start, stop), by in zip(box, offsets, strict=True))


def intersection(one: Box, other: Box) -> Box | None:
    """What two boxes share; ``None`` where they share nothing."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def position(shape: Shape, index: Shape) -> int:
    """Where the element at ``index`` stands in row-major order."""
    at = 0
    for one, length in zip(index, shape, strict=True):
        at = at * length + one
    return at


def slices(box: Box, origin: Box | None = None) -> tuple[slice, ...]:
    """``box`` as an index into a tensor that holds ``origin`` (default: a whole tensor)."""
    if origin is None:
        return tuple(slice(start, stop) for start, stop in box)
    return tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(box, origin, strict=True))


def runs(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """Boxes that together hold the elements ``start .. stop`` of row-major order, in order.

    At most two per dimension and one: a partial first row, whole rows, a partial last row.
    """
    if not shape:
        yield ()
        return
    row = prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last and (start % row or stop % row):
        for inner in runs(shape[1:], start - first * row, stop - first * row):
            yield ((first, first + 1), *inner)
        return
    if start % row:
        yield from runs(shape, start, (first + 1) * row)
        first += 1
    if first < stop // row:
        yield ((first, stop // row), *whole(shape[1:]))
    if stop % row:
        yield from runs(shape, stop // row * row, stop)


def contiguous(shape: Shape, box: Box) -> Iterator[tuple[int, int, Box]]:
    """The parts of ``box`` that lie contiguously in row-major order: start, stop, their box."""
    split = len(shape)
    while split and box[split - 1] == (0, shape[split - 1]):
        split -= 1
    split = max(split - 1, 0)
    leading, trailing = box[:split], box[split:]
    row = prod(shape[split:])
    begin = position(shape[split:], tuple(start for start, _ in trailing))
    size = prod(extent(trailing))
    for index in product(*(range(start, stop) for start, stop in leading)):
        start = position(shape[:split], index) * row + begin
        yield start, start + size, (*((at, at + 1) for at in index), *trailing)


def slabs(box: Box, elements: int) -> Iterator[Box]:
    """``box`` cut into pieces of at most ``elements``, consecutive in row-major order."""
    shape = extent(box)
    axis = 0
    while axis < len(shape) - 1 and prod(shape[axis + 1 :]) > elements:
        axis += 1
    if not shape or prod(shape) <= elements:
        yield box
        return
    step = max(1, elements // prod(shape[axis + 1 :]))
    start, stop = box[axis]
    for index in product(*(range(a, b) for a, b in box[:axis])):
        for at in range(start, stop, step):
            leading = tuple((i, i + 1) for i in index)
            yield (*leading, (at, min(at + step, stop)), *box[axis + 1 :])
