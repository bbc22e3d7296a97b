"""The exception that a user is meant to see, and how a name from a file is shown."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_INTERRUPTED = 130
"""Of a process that Ctrl-C or another wish to stop has ended."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, the wish to stop, and a terminal that was closed."""
_NAME, _TEXT = 200, 4000
"""Characters of a name, and of a whole message, at most."""


def shown(name: object, most: int = _NAME) -> str:
    """A name that comes from a file, as it may go to a terminal: on one line, of bounded length,
    with everything that is not printable (control characters, bidirectional marks, lone
    surrogates) as Python escapes it.

    Args:
        name: a tensor's name, a key, a file's name.
        most: characters; of a longer one the beginning, its length and the end are shown.
    """
    return _bounded(str(name), most, keep="")


def _bounded(text: str, most: int, keep: str) -> str:
    if len(text) > most:
        text = f"{text[: most - most // 4]} ... ({len(text):,} characters) ... {text[-most // 4 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class UserError(Exception):
    """Something the user can put right: printed without a traceback, exit code 2. Whatever it is
    made of, its text holds no control character but the end of a line, and is of bounded length.

    Args:
        where: the file, key or option that is wrong (``recipe.yaml: finetune.layout``).
        what: what is wrong with it.
        fix: what to do about it.
    """

    def __init__(self, where: str, what: str, fix: str = "") -> None:
        self.where, self.what, self.fix = (_bounded(t, _TEXT, "\n") for t in (where, what, fix))
        more = f"\n  fix: {self.fix}" if fix else ""
        super().__init__(f"{self.where}: {self.what}{more}")

    def __reduce__(self) -> tuple[object, ...]:
        """One rank's error is told to the others."""
        return type(self), (self.where, self.what, self.fix)


class UserErrors(UserError):
    """Several of them at once, so that a user mends a recipe in one go."""

    def __init__(self, errors: list[UserError]) -> None:
        self.errors = errors
        Exception.__init__(self, "\n".join(str(error) for error in errors))

    def __reduce__(self) -> tuple[object, ...]:
        """One rank's errors are told to the others."""
        return type(self), (self.errors,)


class RanksCrashed(Exception):
    """A rank that a command started ended by a bug of ours: its traceback is on stderr already, so
    the command ends with exit code 1 and without another."""


@contextmanager
def collect_errors(errors: list[UserError]) -> Iterator[None]:
    """A block whose user errors join ``errors``: what else is wrong is looked for first."""
    try:
        yield
    except UserErrors as found:
        errors += found.errors
    except UserError as found:
        errors.append(found)


@contextmanager
def errors_of(key: str) -> Iterator[None]:
    """A block whose user errors, about a file, are named with the recipe's key that gives it."""
    errors: list[UserError] = []
    with collect_errors(errors):
        yield
    errors = [UserError(key, f"{one.where}: {one.what}", one.fix) for one in errors]
    if errors:
        raise errors[0] if len(errors) == 1 else UserErrors(errors)


def capped(errors: list[UserError], most: int = 8) -> list[UserError]:
    """The first of many errors of one kind, and how many more there are."""
    if len(errors) <= most + 1:
        return errors
    last = errors[most]
    return [*errors[:most], UserError(last.where, f"and {len(errors) - most} more like these")]


@functools.cache
def notice(text: str) -> None:
    """Tell the user, once and by the first rank alone, what still works and should be changed."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"hint: {shown(text, 1000)}\n")


def coloured(text: str) -> str:
    """``text`` in bold red, where the standard error is a terminal that wants colours."""
    wanted = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    return f"\x1b[1;31m{text}\x1b[0m" if wanted else text
