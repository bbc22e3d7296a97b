"""Mistakes, made on the small recipe and met on the command line: one clear error that names file,
key and fix, exit code 2, and nothing left behind: the tree is the same before and after, byte for
byte."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_btx.cli.main import main
from tests.small import btx, tree_hash


def change(old: str, new: str) -> Callable[[Path], None]:
    """The recipe with ``new`` in place of ``old``."""

    def edit(directory: Path) -> None:
        recipe = directory / "recipe.yaml"
        text = recipe.read_text()
        assert old in text
        recipe.write_text(text.replace(old, new, 1))

    return edit


def both(*edits: Callable[[Path], None]) -> Callable[[Path], None]:
    """One after the other."""

    def edit(directory: Path) -> None:
        for one in edits:
            one(directory)

    return edit


@dataclass(frozen=True)
class Bad:
    """A mistake, and what the error about it must say."""

    name: str
    edit: Callable[[Path], None]
    words: tuple[str, ...]
    """File or key, what is wrong, and how to mend it."""
    command: tuple[str, ...] = ("plan", "recipe.yaml")
    environment: dict[str, str] = field(default_factory=dict)


RUN = ("run", "recipe.yaml")


@dataclass(frozen=True)
class Answer:
    """How the command ended, and what it said."""

    code: int
    stdout: str
    stderr: str


class Commands:
    """Commands of btx's in this process: what is refused before a rank starts needs no other. A
    rank itself changes its environment and ends its process, so it gets one."""

    def __init__(
        self, directory: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
    ) -> None:
        self.directory, self.patch, self.capture = directory, patch, capture

    def __call__(self, *arguments: str, environment: dict[str, str] | None = None) -> Answer:
        """``btx ARGUMENTS``, in the test's directory."""
        if arguments[0] == "stage":
            done = btx(*arguments, cwd=self.directory, environment=environment)
            return Answer(done.returncode, done.stdout, done.stderr)
        with self.patch.context() as patch:
            patch.chdir(self.directory)
            for name, value in (environment or {}).items():
                patch.setenv(name, value)
            code = main(list(arguments))
        said = self.capture.readouterr()
        return Answer(code, said.out, said.err)

    def refuse(self, bad: Bad) -> None:
        """Make the mistake, run, and look at the answer and at what is left."""
        bad.edit(self.directory)
        before = tree_hash(self.directory)
        done = self(*bad.command, environment=bad.environment)
        assert done.code == 2, done.stdout + done.stderr
        for word in bad.words:
            assert word in done.stderr, f"{word!r} is not in: {done.stderr}"
        assert "Traceback" not in done.stderr
        assert done.stderr.count("error:") == 1
        assert not re.search(r"\x1b", done.stderr)
        assert done.stdout == ""
        assert tree_hash(self.directory) == before


PAGE = resource.getpagesize()
"""What a disk of memory is counted in: 4 KiB, or 64."""


def fill(place: Path) -> None:
    """A disk, to its last byte."""
    with contextlib.suppress(OSError), (place / "filler").open("ab", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
