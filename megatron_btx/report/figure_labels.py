"""Label placement in figures: no label may overlap another label or a dot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LINE = 15
"""Height of a label in pixels."""
LETTER = 7.4
"""Width of a letter of a label, at most about."""
_REACH = 14
"""How many lines a label may be away from its dot."""
_BESIDE = 9
"""Pixels from a dot's centre to a label beside it; half a dot and a gap."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two have an area in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def within(self, other: Box) -> bool:
        """Whether all of it lies in the other."""
        level = other.top <= self.top and self.bottom <= other.bottom
        return level and other.left <= self.left and self.right <= other.right


def place(dots: Sequence[Point], labels: Sequence[str], room: Box) -> list[Box]:
    """A box for each label, beside its dot: as near as it can be without lying on a dot or on the
    label of an earlier one. Where no place is free, the one with the fewest such meetings.

    Args:
        dots: centres, in pixels.
        labels: of the dots, those first that shall have the best places.
        room: where labels may stand.
    """
    marks = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in dots]
    placed: list[Box] = []
    for dot, label in zip(dots, labels, strict=True):
        taken = [*marks, *placed]

        def badness(box: Box, taken: Sequence[Box] = taken) -> tuple[bool, int]:
            return not box.within(room), sum(map(box.meets, taken))

        placed.append(min(_places(dot, LETTER * len(label)), key=badness))
    return placed


def _places(dot: Point, width: float) -> Iterator[Box]:
    """The nearest first; on the right before the left."""
    x, y = dot
    for lift in sorted(range(-_REACH, _REACH + 1), key=abs):
        top = y + (lift - 0.5) * LINE
        beside = _BESIDE if not lift else _BESIDE + 4
        for left in (x + beside, x - beside - width):
            yield Box(left, top, left + width, top + LINE)
