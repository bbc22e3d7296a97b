"""How far a mix is, and its sources' files read behind it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as Speed

from megatron_btx.errors import UserErrors, capped
from megatron_btx.mix.source_files import SourceFiles
from megatron_btx.weights.plan import Checkpoint

_LEAD = 0.02
"""How far hashes may run ahead of the mix: what one has read is then in memory for the other."""


class Watch:
    """Bytes written, their rate and the time left; usable from any thread."""

    def __init__(self, total: int, out: TextIO) -> None:
        columns = (BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(file=out), disable=not out.isatty())
        self._task = self._bar.add_task("", total=total)
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._total, self._written = max(total, 1), 0
        self._over = self._failed = False

    def advance(self, count: int) -> None:
        """``count`` bytes more are written."""
        with self._lock:
            self._written += count
        self._bar.advance(self._task, count)

    def finished(self) -> None:
        """Nothing is left to write: whoever follows need not wait any more."""
        self._over = True

    def hashes(self, models: Sequence[Checkpoint]) -> dict[str, dict[str, str]]:
        """SHA-256 of every file of every source, read at the pace of the mix.

        Raises:
            UserErrors: files that are not what was written, by the hashes or the CRC-32 that are
                stored with them.
        """
        files = {model.label: SourceFiles(model) for model in models if model.path}
        readers = {label: each.read() for label, each in files.items()}
        done = dict.fromkeys(readers, 0.0)
        while readers and not self._failed:
            label = min(readers, key=done.__getitem__)
            while not self._over and done[label] > self._written / self._total + _LEAD:
                time.sleep(0.005)
            try:
                done[label] = next(readers[label])
            except StopIteration:
                del readers[label]
        if errors := [error for each in files.values() for error in each.errors]:
            raise UserErrors(capped(errors))
        return {m.label: files[m.label].sha256 if m.path else {} for m in models}

    def summary(self) -> str:
        """What was written, and how fast."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self._written / seconds / 1e9
        return f"{self._written / 1e9:.2f} GB written in {seconds:.1f} s, {rate:.2f} GB/s"

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._failed = kind is not None
        self.finished()
        self._bar.stop()
