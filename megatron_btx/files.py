"""Files that appear under their names only when whole and on the disk. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def written(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file to write; it takes the place of ``path`` when the block ends well, else it is gone.

    Args:
        path: the final name; its directory exists.
        mode: ``"w"`` (UTF-8) or ``"wb"``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
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


def sync_directory(directory: Path) -> None:
    """Make what was renamed in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
