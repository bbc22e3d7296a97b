"""The one exception that a user is meant to see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can put right: printed without a traceback, exit code 2.

    Args:
        where: the file, key or option that is wrong (``recipe.yaml: finetune.layout``).
        what: what is wrong with it.
        fix: what to do about it.
    """

    def __init__(self, where: str, what: str, fix: str = "") -> None:
        self.where, self.what, self.fix = where, what, fix
        said = [_printable(part) for part in (where, what, fix)]
        super().__init__(f"{said[0]}: {said[1]}" + (f"\n  fix: {said[2]}" if fix else ""))


def _printable(text: str) -> str:
    """Text that may come from a file, as a terminal can show it: escapes for what is not printed
    (control characters, halves of surrogates, marks that turn the direction of a line), and of what
    has more than 4000 characters the beginning."""
    if len(text) > 4000:
        text = f"{text[:2000]}... ({len(text)} characters)"
    return "".join(
        char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text
    )


class UserErrors(UserError):
    """Several of them at once, so that a user mends a recipe in one go."""

    def __init__(self, errors: list[UserError]) -> None:
        self.errors = errors
        Exception.__init__(self, "\n".join(str(error) for error in errors))


@contextmanager
def noted(errors: list[UserError]) -> Iterator[None]:
    """A block whose user errors join ``errors``: what else is wrong is looked for first."""
    try:
        yield
    except UserErrors as found:
        errors += found.errors
    except UserError as found:
        errors.append(found)
