"""Documents, tokenizers, .bin/.idx files and the order in which they are read."""

from typing import Protocol


class Progress(Protocol):
    """Called with how far something is."""

    def __call__(self, what: str, done: float, **speed: float) -> None:
        """``what`` is being done and ``done`` of it, from 0 to 1; where they are known,
        ``bytes_per_second`` and ``seconds_left``."""


def no_progress(what: str, done: float, **speed: float) -> None:
    """A :class:`Progress` that shows nothing."""
