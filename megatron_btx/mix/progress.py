"""How far a mix is, and hashes of its sources taken behind it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as Speed

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
        """SHA-256 of every file of every source, read at the pace of the mix."""
        found: dict[str, dict[str, str]] = {model.label: {} for model in models}
        readers = {m.label: _hashing(m.path, found[m.label]) for m in models if m.path}
        done = dict.fromkeys(readers, 0.0)
        while readers and not self._failed:
            label = min(readers, key=done.__getitem__)
            while not self._over and done[label] > self._written / self._total + _LEAD:
                time.sleep(0.005)
            try:
                done[label] = next(readers[label])
            except StopIteration:
                del readers[label]
        return found

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


def _hashing(directory: Path, found: dict[str, str]) -> Iterator[float]:
    """Hash the files of a directory into ``found``, saying after each MiB how far it is."""
    paths = [
        path
        for path in sorted(directory.iterdir(), key=_natural)
        if path.suffix in (".safetensors", ".distcp", ".json") or path.name == ".metadata"
    ]
    total, read = max(sum(path.stat().st_size for path in paths), 1), 0
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while data := file.read(1 << 20):
                digest.update(data)
                read += len(data)
                yield read / total
        found[path.name] = digest.hexdigest()


def _natural(path: Path) -> tuple[int, str]:
    return (len(path.name), path.name)
