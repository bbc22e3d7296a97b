"""Documents, tokenizers, .bin/.idx files and the order in which they are read."""

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Told what is being done and how much of it is done, from 0 to 1."""


def no_progress(what: str, done: float) -> None:
    """The :data:`Progress` of those who don't watch."""
