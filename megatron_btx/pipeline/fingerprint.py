"""What identifies the content of the files a recipe names, cheaply enough to ask at every start.

A file counts by its size and a hash: of all of it up to 16 MiB, of sixteen evenly spaced pieces of
1 MiB above that, so that asking about terabytes of text takes seconds. A memo beside the run
remembers the hash of every file whose size and time of change are as they were; a process reads no
file twice, whatever memos it asks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_btx.data.formats.part import pair_files
from megatron_btx.files import written

_PIECE = 1 << 20
_PIECES = 16


_SEEN: dict[str, list[int | str]] = {}
"""What this process has hashed: path -> size, modification time (ns), hash."""


class Memo:
    """Hashes of files by path, valid while size and modification time (ns) stand."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._known: dict[str, list[int | str]] = {}
        self._changed = False
        if path is not None and path.is_file():
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                known = None  # an unreadable memo only costs time: the files are hashed again
            entries = known.items() if isinstance(known, dict) else ()
            self._known = {
                name: entry
                for name, entry in entries
                if isinstance(entry, list) and len(entry) == 3
            }

    def file(self, path: Path) -> str:
        """Hash (hex) of a file's size and content."""
        status = path.stat()
        size, changed = status.st_size, status.st_mtime_ns
        entry = self._known.get(str(path))
        if entry is not None and entry[:2] == [size, changed]:
            return str(entry[2])
        place = str(path.absolute())
        if _SEEN.get(place, [])[:2] != [size, changed]:
            _SEEN[place] = [size, changed, _hash(path, size)]
        self._known[str(path)] = list(_SEEN[place])
        self._changed = True
        return str(_SEEN[place][2])

    def paths(self, paths: Sequence[str]) -> list[list[str]]:
        """``[name, hash]`` of every file in ``paths``, directories walked; names are relative to
        what was given, so that moving a corpus changes nothing. A missing file has hash ``""``:
        recipe/check.py reports it."""
        found = []
        for given in map(Path, paths):
            if given.is_dir():
                files = sorted(item for item in given.rglob("*") if _counts(item, given))
                found += [[str(item.relative_to(given)), self.file(item)] for item in files]
            else:
                files = pair_files(given) or [given]
                found += [[item.name, self.file(item) if item.is_file() else ""] for item in files]
        return found

    def save(self) -> None:
        """Write the memo, if it has a place and anything new to say."""
        if self.path is None or not self._changed:
            return
        # Who may not write here, or has no room to, hashes anew the next time.
        with contextlib.suppress(OSError), written(self.path, durable=False) as file:
            json.dump(self._known, file)
        self._changed = False


def _counts(item: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in item.relative_to(root).parts)
    return item.is_file() and not hidden


def _hash(path: Path, size: int) -> str:
    digest = hashlib.sha256(f"{size}:".encode())
    with path.open("rb") as file:
        if size <= _PIECE * _PIECES:
            for block in iter(lambda: file.read(_PIECE), b""):
                digest.update(block)
        else:
            for piece in range(_PIECES):
                file.seek(piece * (size - _PIECE) // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()
