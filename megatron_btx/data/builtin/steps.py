"""How a worked problem is written, and checked."""

from __future__ import annotations

from fractions import Fraction
from random import Random


def check(ours: object, sympys: object) -> None:
    """That SymPy finds what we found."""
    assert ours == sympys, f"{ours} is not SymPy's {sympys}"


def steps(r: Random, task: str, lines: list[str], answer: str) -> str:
    """A problem's text: the task, the steps to the answer, the answer."""
    opening = r.choice(("Problem: ", "Question. ", "", "Exercise: ", "Q: "))
    middle = r.choice(("Solution.", "Step by step:", "We work it out.", "Solution:", "A:"))
    closing = r.choice(("Answer: {}", "The answer is {}.", "So the result is {}.", "Result: {}"))
    return "\n".join((opening + task, middle, *lines, closing.format(answer))) + "\n"


def frac(value: Fraction | int) -> str:
    """A number as it is written: ``3``, ``-7/2``."""
    value = Fraction(value)
    whole = value.denominator == 1
    return str(value.numerator) if whole else f"{value.numerator}/{value.denominator}"
