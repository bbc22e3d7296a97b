"""Directories that appear whole or not at all, and go on where they were interrupted.

Everything is written below ``NAME.partial``: each piece under a name of its own until it is on
disk, then renamed. Running the same plan again finds the finished pieces and makes the others; the
directory gets its own name last.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.files import sync_directory

logger = logging.getLogger(__name__)

_IDENTITY = ".btx-identity"


@dataclass(frozen=True)
class Piece:
    """One large file of the directory."""

    name: str
    nbytes: int
    """About how many bytes it will have: for the check of free space."""
    write: Callable[[BinaryIO], None]


def write_directory(
    out: Path,
    *,
    identity: str,
    pieces: Sequence[Piece],
    workers: int = 1,
    files: Callable[[], Mapping[str, bytes]],
) -> None:
    """Write ``out``.

    Args:
        out: must not exist; its parent must.
        identity: of what is written; an interrupted run of another identity is discarded.
        pieces: the large files, each resumable as a whole.
        workers: how many of them are written side by side.
        files: the small ones, asked for when all pieces are there.

    Raises:
        UserError: ``out`` exists, cannot be written, or does not fit the disk. Nothing is left.
    """
    if out.exists():
        raise UserError(str(out), "exists already", "remove it, or give another name")
    partial = out.with_name(out.name + ".partial")
    try:
        if _read(partial / _IDENTITY) != identity:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write_small(partial / _IDENTITY, identity.encode())
        missing = [piece for piece in pieces if not (partial / piece.name).exists()]
        if len(missing) < len(pieces):
            logger.info("%s: going on after %d pieces", out, len(pieces) - len(missing))
        _check_space(partial, sum(piece.nbytes for piece in missing))
        errors: list[UserError] = []
        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(_write_piece, partial / p.name, p.write) for p in missing]
            try:
                for job in jobs:
                    errors += job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if errors:
            raise UserErrors(list({str(error): error for error in errors}.values()))
        for name, content in files().items():
            _write_small(partial / name, content)
        (partial / _IDENTITY).unlink()
        sync_directory(partial)
        os.rename(partial, out)
        sync_directory(out.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        what = f"cannot be written: {error.strerror or error}"
        raise UserError(str(out), what, "free some space or give another directory") from error
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def as_json(value: Any) -> bytes:
    """JSON as people read it."""
    return (json.dumps(value, indent=2) + "\n").encode()


def _write_piece(path: Path, write: Callable[[BinaryIO], None]) -> list[UserError]:
    """One piece; what is wrong with it, so that the others' errors can be told too."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        try:
            with _flushed_meanwhile(file):
                write(file)
        except UserErrors as found:
            return found.errors
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    return []


@contextmanager
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


def _write_small(path: Path, content: bytes) -> None:
    """Under its own name at once (unlike ``files.written``): the directory's name is what says that
    a file is whole, and a run that is killed must not leave others in it."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        what = f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        raise UserError(str(directory.parent), what, "free some space or give another directory")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
