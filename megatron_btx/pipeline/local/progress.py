"""What a person sees while stages run: a bar each on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megatron_btx.errors import shown
from megatron_btx.pipeline import state
from megatron_btx.recipe.messages import amount, clock
from megatron_btx.train.goodput import read_attempts
from megatron_btx.train.metrics import record_of
from megatron_btx.train.summary import Summary

if TYPE_CHECKING:
    from rich.progress import Progress

    from megatron_btx.pipeline.local.job import StageJob, Verdict

_WORDS = {"done": "done", "stopped": "stopped", "failed": "failed"}


@dataclass(slots=True)
class StageProgress:
    """How far a stage is, read from what it writes."""

    directory: Path
    done: float = 0.0
    total: float = 0.0
    loss: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    text: str = ""
    summary: Summary = field(default_factory=Summary)
    bytes_per_second: float = 0.0
    """Of text that is tokenized."""
    _left: float | None = None
    _began: float = 0.0
    """The latest attempt."""
    _recorded: float = 0.0
    """When an attempt last wrote that it goes on from its checkpoint, or begins."""
    _inode: int = 0
    _offset: int = 0
    _times: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=30))

    def read(self) -> StageProgress:
        """Take in what is new; cheap enough to be called ten times a second."""
        path = self.directory / "metrics.jsonl"
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset = status.st_ino, 0  # cut to the steps that stand
                self._times.clear()
                self.summary = Summary()
            file.seek(self._offset)
            new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._offset += len(whole)
            for line in whole.splitlines():
                with contextlib.suppress(ValueError):
                    self._take(record_of(line) or {})
        attempts = read_attempts(self.directory)
        self._began = attempts[-1]["time"] if attempts else 0.0
        progress = state.find_json(self.directory / "progress.json") or {}
        done = progress.get("done")
        if isinstance(done, int | float) and 0 <= done <= 1:  # a damaged one says nothing
            self.done, self.total = float(done), 1.0
            self.text = f"{shown(progress.get('what'))} {self.done:.0%}"
        rate, left = (progress.get(name) for name in ("bytes_per_second", "seconds_left"))
        self.bytes_per_second = float(rate) if isinstance(rate, int | float) else 0.0
        self._left = float(left) if isinstance(left, int | float) else None
        return self

    def _take(self, record: dict[str, Any]) -> None:
        kind = record.get("kind")
        if kind is not None:
            self.summary.add(record)
        if kind == "start":
            self.total, self.text = float(record.get("total_steps", 0)), ""
            self._recorded = float(record.get("time", math.inf))
            self._times.clear()  # the pause before a resume does not count
        elif kind == "train":
            self.done, self.loss = float(record["step"]), record.get("loss")
            self.tokens_per_second = record.get("tokens_per_second")
            self.mfu = record.get("throughput/device/MFU")
            if "time" in record:
                self._times.append((float(record["step"]), float(record["time"])))

    @property
    def starting(self) -> bool:
        """Whether the latest attempt has said nothing yet: the figures are of the one before."""
        return not self.text and self._began > self._recorded

    @property
    def seconds_left(self) -> float | None:
        """As the stage says itself, or from the pace of its last steps."""
        if self._left is not None:
            return self._left
        if len(self._times) < 2 or not self.total:
            return None
        (first, began), (last, ended) = self._times[0], self._times[-1]
        return (self.total - self.done) * (ended - began) / (last - first) if last > first else None

    @property
    def words(self) -> str:
        """``step 12/400  loss 3.214  10.1k tokens/s  1:05 left``."""
        if self.text:
            return self.text
        if self.starting or not self.total:
            return "starting"
        parts = [f"step {self.done:.0f}/{self.total:.0f}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.tokens_per_second:
            parts.append(f"{amount(self.tokens_per_second)} tokens/s")
        if self.mfu:
            parts.append(f"MFU {self.mfu:.0%}")
        if self.seconds_left is not None:
            parts.append(f"{clock(self.seconds_left)} left")
        return "  ".join(parts)


class _Patient:
    """A stream whose reader may go away: a closed terminal or pipe is no reason to end a run. What
    is said after that, also when Python ends, goes nowhere."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write; a terminal that has been closed is ignored."""
        try:
            return self._stream.write(text)
        except OSError:
            self._turn_away()
            return len(text)

    def flush(self) -> None:
        """Flush, likewise."""
        try:
            self._stream.flush()
        except OSError:
            self._turn_away()

    def _turn_away(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class ProgressView:
    """Plain lines: when a stage starts and ends, and every ``interval`` seconds between."""

    def __init__(self, stream: IO[str] | None = None, interval: float = 20.0) -> None:
        self.stream: Any = _Patient(stream or sys.stderr)
        self.interval = interval
        self._standing: dict[str, StageProgress] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> ProgressView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def begin(self, job: StageJob) -> None:
        """A stage has started."""
        name = job.stage.name
        self._standing[name] = StageProgress(job.directory)
        self._said[name] = time.monotonic()
        attempt = f", attempt {job.attempt}" if job.attempt > 1 else ""
        ranks = f"{job.stage.world_size} rank{'s' * (job.stage.world_size > 1)}"
        self.note(f"{name}: started ({ranks}{attempt})")

    def update(self, jobs: Sequence[StageJob]) -> None:
        """Print how far the running stages are, where it is time to."""
        for job in jobs:
            if time.monotonic() - self._said[job.stage.name] >= self.interval:
                self._said[job.stage.name] = time.monotonic()
                self.note(f"{job.stage.name}: {self._standing[job.stage.name].read().words}")

    def end(self, job: StageJob, verdict: Verdict) -> None:
        """A stage has ended."""
        self.note(f"{job.stage.name}: {_WORDS[verdict]} after {clock(job.seconds)}")

    def note(self, text: str) -> None:
        """Print a line."""
        self.stream.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        self.stream.flush()


class Bars(ProgressView):
    """A bar for every running stage, kept at the foot of the terminal."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        super().__init__(stream)
        self._bars: Progress | None = None
        self._rows: dict[str, Any] = {}
        self._next = 0.0

    def __enter__(self) -> Bars:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        # auto_refresh would start a thread, and processes are started from this one.
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            TimeElapsedColumn(),
            TextColumn("{task.fields[words]}", markup=False),
            console=Console(file=self.stream, highlight=False),
            auto_refresh=False,
            transient=False,
        )
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._bars is not None
        self._bars.stop()

    def begin(self, job: StageJob) -> None:
        """A stage has started."""
        assert self._bars is not None
        name = job.stage.name
        self._standing[name] = StageProgress(job.directory)
        self._rows[name] = self._bars.add_task(name, total=None, words="starting")

    def update(self, jobs: Sequence[StageJob]) -> None:
        """Print how far the running stages are, where it is time to."""
        assert self._bars is not None
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 0.25
        for job in jobs:
            seen = self._standing[job.stage.name].read()
            row = self._rows[job.stage.name]
            total = None if seen.starting else seen.total or None
            # A full bar would stop its clock, and a stage is at work until it says otherwise.
            completed = min(seen.done, 0.999 * seen.total)
            self._bars.update(row, completed=completed, total=total, words=seen.words)
        self._bars.refresh()

    def end(self, job: StageJob, verdict: Verdict) -> None:
        """A stage has ended."""
        assert self._bars is not None
        row = self._rows.pop(job.stage.name)
        seen = self._standing.pop(job.stage.name).read()
        self._bars.remove_task(row)
        loss = f", loss {seen.loss:.3f}" if seen.loss is not None else ""
        sign = {"done": "[green]✓", "stopped": "[yellow]■", "failed": "[red]✗"}[verdict]
        words = f"{job.stage.name} {_WORDS[verdict]} in {clock(job.seconds)}{loss}"
        self._bars.console.print(f"{sign}[/] {words}")

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        assert self._bars is not None
        self._bars.console.print(text, markup=False)


def view(stream: IO[str] | None = None) -> ProgressView:
    """Bars where ``stream`` (by default the standard error) is a terminal, else plain lines."""
    stream = stream or sys.stderr
    return Bars(stream) if stream.isatty() else ProgressView(stream)
