"""Directories that appear whole or not at all, and go on where they were interrupted.

Everything is written below ``NAME.partial`` (claimed_directory.py), which one process has at a
time: each file under a name of its own until it is on disk, then renamed. Running the same plan
again finds the finished files and makes the others; the directory gets its own name last.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.files import written
from megatron_btx.weights.claimed_directory import claimed, unwritable, write_small
from megatron_btx.weights.file_hashes import HASHES, Hash, hash_file, hashes_json, hashes_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LargeFile:
    """One large file of the directory."""

    name: str
    nbytes: int
    """About how many bytes it will have: for the check of free space."""
    write: Callable[[BinaryIO], None]


def write_directory(
    out: Path,
    *,
    identity: str,
    large_files: Sequence[LargeFile],
    workers: int = 1,
    files: Callable[[], Mapping[str, bytes]],
    check: Callable[[Path], object] = lambda _directory: None,
) -> None:
    """Write directory ``out`` under another name, which it loses when it is whole; an interrupted
    call can be repeated.

    Args:
        out: must not exist; its parent must.
        identity: of what is written; an interrupted run of another identity is discarded.
        large_files: the large files, each resumable as a whole.
        workers: how many of them are written side by side.
        files: the small ones, asked for when all large ones are there.
        check: called with the directory when all is in it, before it gets its name.

    Raises:
        UserError: ``out`` exists, is being written by another process, cannot be written, does not
            fit the disk, or ``check`` refuses it. Nothing is left.
    """
    with claimed(out, identity) as partial:
        try:
            with unwritable(out):
                hashes = _write_large(out, partial.path, large_files, workers)
                for name, content in files().items():
                    write_small(partial.path / name, content)
                    hashes[name] = Hash(content).hexdigest()
                write_small(partial.path / HASHES, hashes_json(hashes))
                check(partial.path)
        except UserError:
            partial.discard()
            raise
        with unwritable(out):
            partial.finish()


def _write_large(
    out: Path, partial: Path, large_files: Sequence[LargeFile], workers: int
) -> dict[str, str]:
    """Write the large files that are not there yet; the hashes of all."""
    missing = [file for file in large_files if not (partial / file.name).exists()]
    if len(missing) < len(large_files):
        logger.info("%s: going on after %d files", out, len(large_files) - len(missing))
    _check_space(partial, sum(file.nbytes for file in missing))
    absent = {file.name for file in missing}
    hashes = {p.name: hash_file(partial / p.name) for p in large_files if p.name not in absent}
    errors: list[UserError] = []
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool, _stopped_on_error(pool, stop):
        jobs = {p.name: pool.submit(_write_one, partial / p.name, p.write, stop) for p in missing}
        for name, job in jobs.items():
            found = job.result()
            if isinstance(found, str):
                hashes[name] = found
            else:
                errors += found
    if errors:
        raise UserErrors(list({str(error): error for error in errors}.values()))
    return hashes


@contextlib.contextmanager
def _stopped_on_error(pool: ThreadPoolExecutor, stop: threading.Event) -> Iterator[None]:
    """Where the block fails, also while it hands out the jobs, none is begun or goes on."""
    try:
        yield
    except BaseException:
        stop.set()
        pool.shutdown(cancel_futures=True)
        raise


def add_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Put small files into a directory that was written here, and their hashes beside the others'.
    What is there of these names stays whole whenever this ends, also on a full disk. While they
    take their names ``hashes.json`` says nothing of them: killed in between, this leaves no file
    that looks damaged.

    Raises:
        OSError: one cannot be written.
        UserError: its ``hashes.json`` is damaged.
    """
    others = {name: found for name, found in hashes_of(directory).items() if name not in files}
    hashes = {name: Hash(content).hexdigest() for name, content in files.items()}
    with contextlib.ExitStack() as waiting:
        for name, content in {**files, HASHES: hashes_json(others)}.items():  # which is named first
            file = waiting.enter_context(written(directory / name, "wb"))
            file.write(content)
            file.flush()
    with written(directory / HASHES, "wb") as file:
        file.write(hashes_json(others | hashes))


def as_json(value: Any) -> bytes:
    """JSON, indented."""
    return (json.dumps(value, indent=2) + "\n").encode()


class _Cancelled(Exception):
    """Another file failed, or the user wants no more."""


class _Hashed:
    """A file that is written, and hashed on the way as long as it is written in order."""

    def __init__(self, file: BinaryIO, stop: threading.Event) -> None:
        self._file, self._stop, self._digest = file, stop, Hash()
        self._in_order = True
        self.tell = file.tell

    def write(self, data: bytes | memoryview) -> int:
        if self._stop.is_set():
            raise _Cancelled
        self._digest.update(data)
        return self._file.write(data)

    def seek(self, place: int) -> int:
        self._in_order = False
        return self._file.seek(place)

    def hexdigest(self) -> str:
        """Of all that is in the file, which is on the disk."""
        return self._digest.hexdigest() if self._in_order else hash_file(Path(self._file.name))


def _write_one(
    path: Path, write: Callable[[BinaryIO], None], stop: threading.Event
) -> str | list[UserError]:
    """One file: its hash, or what is wrong with it, so that the others' errors can be told too."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        hashed = _Hashed(file, stop)
        try:
            with _flushed_meanwhile(file):
                write(cast(BinaryIO, hashed))
        except UserErrors as found:
            return found.errors
        file.flush()
        os.fsync(file.fileno())
        digest = hashed.hexdigest()
    os.replace(unfinished, path)
    return digest


@contextlib.contextmanager
def _flushed_meanwhile(file: BinaryIO) -> Iterator[None]:
    """Keep the disk at work from the first byte. Left alone, the system begins to write when a
    tenth of memory waits, and all of that time is spent again in the last sync."""
    over = threading.Event()
    failed: list[OSError] = []

    def flush() -> None:
        try:
            while not over.wait(0.1):
                os.fdatasync(file.fileno())
        except OSError as error:  # the system tells it once: the last sync would not know of it
            failed.append(error)

    flusher = threading.Thread(target=flush, daemon=True)
    flusher.start()
    try:
        yield
    finally:
        over.set()
        flusher.join()
    if failed:
        raise failed[0]


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        what = f"needs {_amount(needed)}, {_amount(free)} are free"
        raise UserError(str(directory.parent), what, "free some space or give another directory")


def _amount(size: int) -> str:
    unit, name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    return f"{size / unit:.1f} {name}"
