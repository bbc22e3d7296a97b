"""A source's files, hashed for ``mix.json`` and checked in the same pass.

They are read a little behind the mix, out of memory, where it has just read them. What is compared:
the hashes that were written with the checkpoint (``hashes.json``); where there are none, the CRC-32
that ``torch.save`` stored with each tensor that is used. :class:`MixProgress` shows
how far the mix is and keeps them behind it.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as Speed

from megatron_btx.errors import UserError, UserErrors, capped, shown
from megatron_btx.weights.file_hashes import Hash, difference, hashes_of, is_edited
from megatron_btx.weights.ops import takes
from megatron_btx.weights.plan import Checkpoint
from megatron_btx.weights.read_torch_zip import Checksum
from megatron_btx.weights.source import View
from megatron_btx.weights.torch_dist import TorchDistSource

logger = logging.getLogger(__name__)

_READ = 1 << 20
_LEAD = 0.02
"""How far hashes may run ahead of the mix: what one has read is then in memory for the other."""


class SourceFiles:
    """The files of one source.

    Args:
        model: with a path.
    """

    def __init__(self, model: Checkpoint) -> None:
        assert model.path is not None
        self._model, self._directory = model, model.path
        self.sha256: dict[str, str] = {}
        """By name, of weights and descriptions, when all is read."""
        self.errors: list[UserError] = []
        """What is not as it was written."""

    def read(self) -> Iterator[float]:
        """Read all of it, saying after each MiB which share is done."""
        known = hashes_of(self._directory)
        crcs = {} if known else _checksums(self._model)
        paths = [path for path in self._directory.iterdir() if self._is_described(path)]
        more = [self._directory / name for name in known]
        for path in more:
            if not path.is_file():
                self._compare(path, "")
        paths += sorted({path for path in more if path.is_file()} - set(paths))
        total, read = max(sum(path.stat().st_size for path in paths), 1), 0
        for path in sorted(paths, key=_natural):
            name = str(path.relative_to(self._directory))
            crc = _Crc(path, crcs.get(path, ()))
            sha256, fast = hashlib.sha256(), Hash()
            with path.open("rb", buffering=0) as file:
                while data := file.read(_READ):
                    sha256.update(data)
                    fast.update(data)
                    crc.update(data)
                    read += len(data)
                    yield read / total
            if self._is_described(path):
                self.sha256[name] = sha256.hexdigest()
            self.errors += crc.errors
            if name in known:
                self._compare(path, known[name], fast.hexdigest())

    def _compare(self, path: Path, wanted: str, found: str | None = None) -> None:
        error = difference(path, wanted, found)
        if error and is_edited(path.name):
            logger.warning("%s: %s", error.where, error.what)
        elif error:
            self.errors.append(error)

    def _is_described(self, path: Path) -> bool:
        """Whether ``mix.json`` names the file: weights, and what says what they are."""
        kind = path.suffix in (".safetensors", ".distcp", ".json") or path.name == ".metadata"
        return kind and path.parent == self._directory and path.is_file()


class _Crc:
    """CRC-32 of parts of a file, while the file passes by in order."""

    def __init__(self, path: Path, parts: Sequence[Checksum]) -> None:
        self._path, self._parts = path, list(reversed(parts))
        self._at = self._crc = 0
        self.errors: list[UserError] = []

    def update(self, data: bytes) -> None:
        """The next bytes."""
        end, view = self._at + len(data), memoryview(data)
        while self._parts and self._parts[-1].start < end:
            part = self._parts[-1]
            stop = part.start + part.size
            inside = view[max(part.start - self._at, 0) : stop - self._at]
            self._crc = zlib.crc32(inside, self._crc)
            if stop > end:
                break
            self._parts.pop()
            if self._crc != part.crc:
                what = f"tensor {shown(part.tensor)} is not what was written (CRC-32)"
                fix = "copy the checkpoint again, or take an earlier step"
                self.errors.append(UserError(str(self._path), what, fix))
            self._crc = 0
        self._at = end


def _checksums(model: Checkpoint) -> dict[Path, list[Checksum]]:
    view = model.source
    if not isinstance(view, View) or not isinstance(view.of, TorchDistSource):
        return {}
    used = {take.name for expression in view.expressions.values() for take in takes(expression)}
    return view.of.checksums(sorted(used))


def _natural(path: Path) -> tuple[int, str]:
    return (len(path.name), path.name)


class MixProgress:
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
        """Nothing is left to write: the hashes need not wait any more."""
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

    def __enter__(self) -> MixProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._failed = kind is not None
        self.finished()
        self._bar.stop()
