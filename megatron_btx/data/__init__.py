"""Text to token files: documents, tokenizers, .bin/.idx pairs, and the order of training
samples."""

from typing import Protocol


class Progress(Protocol):
    """A function that is told how far a task is."""

    def __call__(self, what: str, done: float, **speed: float) -> None:
        """Report progress.

        Args:
            what: the task.
            done: the share of it that is done, from 0 to 1.
            speed: ``bytes_per_second`` and ``seconds_left``, if known.
        """


def no_progress(what: str, done: float, **speed: float) -> None:
    """A :class:`Progress` that does nothing."""
