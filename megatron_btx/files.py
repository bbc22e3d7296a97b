"""Files that appear under their names only when whole and on the disk. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_btx.errors import UserError


def unfinished(path: Path) -> Path:
    """The name under which this process makes what is to be at ``path``: ``.NAME.PID.tmp``."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sweep(directory: Path) -> None:
    """Delete what killed processes left unfinished in ``directory`` and below. Whoever calls it
    knows that none is at work there."""
    for left in list(directory.rglob(".*.tmp")):  # a walk does not like what it walks to vanish
        if not re.search(r"\.\d+\.tmp$", left.name):
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def written(path: Path, mode: str = "w", *, durable: bool = True) -> Iterator[IO[Any]]:
    """A file to write; it takes the place of ``path`` when the block ends well, else it is gone.

    Args:
        path: the final name; its directory exists.
        mode: ``"w"`` (UTF-8) or ``"wb"``.
        durable: wait until it is on the disk. What is written anew all the time need not be.
    """
    temporary = unfinished(path)
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON."""
    with written(path) as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; ``None`` where there is no whole one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def check_file(path: Path) -> None:
    """Before any work: that a file can be written at ``path``.

    Raises:
        UserError: something else is there, or no directory that would hold it.
    """
    if path.exists() and not path.is_file():
        raise UserError(str(path), "is there and is no file", "give the name of a file")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError(str(path.parent), "no such directory", "make it first")
    _check_writable(parent)


def check_directory(path: Path) -> None:
    """Before any work: that there is a directory at ``path`` to write in, or that one can be made.

    Raises:
        UserError: it, or what it would lie in, is no directory, or cannot be written.
    """
    there = path.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise UserError(str(there), "is not a directory", "give the name of a directory")
    _check_writable(there)


def _check_writable(directory: Path) -> None:
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(str(directory), "cannot be written", "make it writable, or choose another")


def newest_step(directory: Path) -> Path | None:
    """The last checkpoint (``step_XXXXXXXX``) of a stage, in its ``checkpoints/`` or in itself."""
    for place in (directory / "checkpoints", directory):
        if steps := sorted(place.glob("step_????????")):
            return steps[-1]
    return None


def sync_directory(directory: Path) -> None:
    """Make what was renamed in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
