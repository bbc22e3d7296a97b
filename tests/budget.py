"""CPU seconds of each room's tests beside its budget, printed at the end of a session."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import psutil
import pytest

BUDGET = {
    "engine": 300,
    "cli": 160,
    "examples": 120,
    "pipeline": 90,
    "mix": 85,
    "evaluate": 80,
    "data": 65,
    "recipe": 60,
    "families": 40,
    "collection": 30,
    "train": 30,
    ".": 25,
    "weights": 25,
    "report": 20,
    "tools": 5,
    "megatron_bridge": 5,
    "slurm": 140,
    "megatron_lm": 80,
}
"""CPU seconds, processes that a test starts included, as measured and rounded up: on two idle cores
with AVX-512 and Python 3.11, where ``make test`` takes 1,053 in all and 9:56. ``slurm`` is that of
``make test-slurm``, ``megatron_lm`` that of Python 3.12, where the others take a third more."""


class Rooms:
    """A pytest plugin: books the time since the last change of room on the room that was left.

    Not booked: processes whose parent was killed. Under pytest-xdist the workers send what they
    have booked to the one that prints.
    """

    def __init__(self, *, books: bool) -> None:
        """``books``: not where workers run the tests: they do."""
        self.books = books
        self.spent: Counter[str] = Counter()
        self._room, self._since = "collection", 0.0

    def _enter(self, room: str) -> None:
        if not self.books:
            return
        now = _cpu_seconds()
        self.spent[self._room] += now - self._since
        self._room, self._since = room, now

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """``tests/<room>/.../test_x.py::test_y``, or a file of tests/ itself."""
        _, room, *rest = nodeid.partition("::")[0].split("/")
        if (room if rest else ".") != self._room:
            self._enter(room if rest else ".")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._enter("collection")
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["rooms"] = dict(self.spent)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """pytest-xdist: a worker has ended (a crashed one says nothing)."""
        self.spent.update(getattr(node, "workeroutput", {}).get("rooms", {}))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.spent.total() < 60:
            return
        terminalreporter.section("CPU seconds by room")
        for room, seconds in sorted(self.spent.items(), key=lambda item: -item[1]):
            budget = BUDGET.get(room, 0)
            over = "  over its budget" if budget and seconds > budget else ""
            terminalreporter.line(f"{room:16}{seconds:6.0f} of {budget or '-':>4}{over}")
        terminalreporter.line(f"{'all':16}{self.spent.total():6.0f} of {sum(BUDGET.values()):>4}")


def _cpu_seconds() -> float:
    """Of this process and its descendants, those that have ended included."""
    this = psutil.Process()
    seconds = 0.0
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # ended meanwhile
            seconds += sum(process.cpu_times()[:4])
    return seconds
