"""Files that appear under their names only when whole and on the disk. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megatron_btx.errors import STOPS, UserError

JSON_LIMIT = 16 << 20
"""Bytes that a JSON file may have which describes a model or a run."""
JOURNAL_LIMIT = 4 << 30
"""Bytes that a journal may have: a line a step, of millions of steps."""
_DEPTH = 64
"""Levels of lists and objects in such a file, far more than any of them has."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WRITE_FIXES = {
    **dict.fromkeys(FULL, "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions"),
    errno.EROFS: "make it writable",
    errno.EIO: "see the disk and the system's log",
}
"""What a person can do about a place that cannot be written, by the system's number."""


def not_written(path: Path, error: OSError) -> UserError:
    """For what could not be written at ``path``, with what to do about it."""
    fixes = [WRITE_FIXES.get(error.errno or 0), "give another directory"]
    what = f"cannot be written: {error.strerror or error}"
    return UserError(str(path), what, " or ".join(filter(None, fixes)))


def unfinished(path: Path, process: int | None = None) -> Path:
    """The name under which a process (this one) makes what is to be at ``path``:
    ``.NAME.PID.tmp``."""
    return path.with_name(f".{path.name}.{process or os.getpid()}.tmp")


@contextmanager
def undisturbed() -> Iterator[None]:
    """What takes a moment and must not be left half done, as the removal of what is unfinished: a
    wish to stop that comes meanwhile is heard behind the block."""
    came: list[int] = []
    former: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        former = {n: handler for n in STOPS if callable(handler := signal.getsignal(n))}
    try:
        for number in former:
            signal.signal(number, lambda number, _frame: came.append(number))
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def remove_tree(directory: Path) -> None:
    """Delete a directory of ours with all that is in it, as far as that goes."""
    with undisturbed():
        shutil.rmtree(directory, ignore_errors=True)


def sweep(directory: Path) -> None:
    """Delete what killed processes left unfinished in ``directory`` and below. Whoever calls it
    knows that none is at work there."""
    for left in list(directory.rglob(".*.tmp")):  # a list: files vanish under a walk
        if not re.search(r"\.\d+\.tmp$", left.name):
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def written(
    path: Path, mode: str = "w", *, durable: bool = True, replace: bool = True
) -> Iterator[IO[Any]]:
    """A file to write; it takes the place of ``path`` when the block ends well, else it is gone.

    Args:
        path: the final name; its directory exists.
        mode: ``"w"`` (UTF-8) or ``"wb"``.
        durable: wait until it is on the disk. What is written anew all the time need not be.
        replace: whether it may take the place of another file.

    Raises:
        FileExistsError: it may not, and somebody has made ``path``, even a moment ago.
        OSError: it cannot be written; it names ``path``, also where the system names no file.
    """
    temporary = unfinished(path)
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            _link(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a write does not know whose file it is
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    """The name ``path`` for a file, unless there is one: in one step, where the file system has
    hard links."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON."""
    with written(path) as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def json_text(content: Any, **options: Any) -> str:
    """``content`` as JSON for any reader: a number that is not finite is ``null`` there.

    Args:
        content: of mappings, lists, text and numbers.
        options: of ``json.dumps``.
    """
    return json.dumps(_finite(content), allow_nan=False, **options)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


class ProgressFile:
    """Writes how far a stage is to ``progress.json``, a few times a second at most."""

    def __init__(self, path: Path) -> None:
        self.path, self._next = path, 0.0

    def __call__(self, what: str, done: float, **speed: float) -> None:
        """``what`` is being done, how much of it is, from 0 to 1, and how fast."""
        now = time.monotonic()
        if now >= self._next or done >= 1:
            self._next = now + 0.2
            with written(self.path, durable=False) as file:
                json.dump({"what": what, "done": done, **speed}, file)

    def forget(self) -> None:
        """Remove it: the stage goes on to what tells of itself elsewhere."""
        self.path.unlink(missing_ok=True)


def read_bytes(path: Path, limit: int, wanted: str = "a file that can be read") -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Args:
        path: the file.
        limit: bytes.
        wanted: what it should be, as errors call it.

    Raises:
        UserError: there is none, it cannot be read, is a pipe or a device, or is larger.
    """
    try:
        return _content(path, limit)
    except FileNotFoundError:
        fix = f"give the path of {wanted}"
        raise UserError(str(path), "there is no such file", fix) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        what = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise UserError(str(path), what, f"give the path of {wanted}") from None


def _content(path: Path, limit: int) -> bytes:
    """:func:`read_bytes`, what the system says as it says it."""
    # A pipe without a writer would block in open(), and /dev/zero has no end.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UserError(str(path), "is a pipe or a device, not a file", "give a file")
        # Not limit + 1 at once: that much memory would be asked for, whatever the file holds.
        content = file.read(min(limit, status.st_size) + 1)
    if len(content) > limit:
        size = max(status.st_size, len(content))
        what = f"is too large: {size:,} bytes, and at most {limit:,} are read"
        raise UserError(str(path), what, "give the file that is meant")
    return content


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The object in a JSON file that describes something.

    Raises:
        UserError: there is no such file (:func:`read_bytes`), or none that can be read as such
            (:func:`parse_json`).
    """
    return parse_json(read_bytes(path, limit), str(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a journal, one a line; none where there is no file. A line that was cut off
    (its writer was killed, the disk was full) is no object: it is passed over."""
    try:
        content = _content(path, JOURNAL_LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        return []
    lines = []
    for text in content.decode("utf-8", errors="replace").split("\n"):
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add an object to a journal, after a line that was cut off on a line of its own.

    Raises:
        OSError: it cannot be written whole, and the journal is as it was.
    """
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        content = start + json.dumps(record).encode() + b"\n"
        try:
            while content:  # what fits comes first, and then the error
                content = content[file.write(content) :]
        except OSError:
            file.truncate(size)
            raise


def find_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any] | None:
    """The object in a JSON file; ``None`` where there is no whole one.

    Raises:
        UserError: what is there cannot be read, is a pipe or a device, or above ``limit`` bytes.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        pass  # said below
    content = read_bytes(path, limit)
    try:
        return parse_json(content, str(path))
    except UserError:
        return None


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """The object that JSON text (UTF-8) describes.

    Args:
        content: the text.
        where: what errors name.

    Raises:
        UserError: it is no JSON or no object, gives a key twice, is nested more than 64 deep, or
            has an integer of more than 100 digits.
    """
    again = "make the file anew, or copy it again"
    try:
        found = json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_int=_sane_integer
        )
    except (ValueError, RecursionError) as error:
        what = "is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(where, f"is damaged, not JSON: {what}", again) from None
    if not isinstance(found, dict):
        raise UserError(where, "is damaged: it holds no JSON object (`{...}`)", again)
    if _deep(found):
        raise UserError(where, f"is nested more than {_DEPTH} deep", again)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        double = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"the key {double[:100]!r} stands there twice")
    return found


def _sane_integer(digits: str) -> int:
    if len(digits) > 100:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _deep(content: Any) -> bool:
    level = [content]
    for _ in range(_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [item for each in inner for item in each if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def check_not_read(path: Path, inputs: Iterable[str | Path]) -> None:
    """Before any work: that a result does not take the place of what it is made of.

    Raises:
        UserError: ``path`` is one of ``inputs``, by whatever name.
    """
    if path.resolve() in {Path(one).resolve() for one in inputs}:
        raise UserError(str(path), "is read here, and would be replaced", "give another name")


def seen_from_here(path: Path) -> Path:
    """A path as a user would write it: relative where it lies below the current directory."""
    path = Path(os.path.abspath(path))
    return path.relative_to(here) if path.is_relative_to(here := Path.cwd()) else path


def no_directory(path: Path) -> UserError:
    """That something was to lie in what is no directory."""
    if path.exists():
        return UserError(str(path), "is not a directory", "give another place, or move it away")
    return UserError(str(path), "no such directory", "make it first")


def check_file(path: Path) -> None:
    """Before any work: that a file can be written at ``path``.

    Raises:
        UserError: something else is there, or no directory that would hold it.
    """
    if path.exists() and not path.is_file():
        raise UserError(str(path), "exists and is not a file", "give the name of a file")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise no_directory(path.parent)
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
    """The last checkpoint (``step_XXXXXXXX``) of a stage, in its ``checkpoints/`` or in itself.
    A link to what is no longer there is none."""
    for place in (directory / "checkpoints", directory):
        steps = [path for path in place.glob("step_????????") if path.name[5:].isdecimal()]
        if there := sorted(path for path in steps if path.is_dir()):
            return there[-1]
    return None


def sync_directory(directory: Path) -> None:
    """Make what was renamed in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(file: IO[Any], kind: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file (flock) if nobody else has it, until it is closed or the process ends.

    Args:
        file: the file.
        kind: ``fcntl.LOCK_EX`` or ``fcntl.LOCK_SH``.

    Returns:
        Whether it is locked.

    Raises:
        UserError: its file system has no locks.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        raise UserError(
            str(Path(file.name).parent),
            f"its file system has no file locks (flock: {error.strerror}), by which two processes "
            "writing to one place are told apart",
            "use another file system, or mount this one with locks (Lustre: -o flock; NFS: a "
            "running lock manager, or -o local_lock=flock where one machine uses it)",
        ) from error
    return True


def named_path(word: str) -> tuple[str, Path]:
    """``NAME=PATH`` or ``PATH`` of the command line; the name is empty where none is given.

    A name holds no ``/``, so that an ``=`` in a directory's name (``runs/lr=1e-4``) is no label;
    what exists as it stands is a path.
    """
    name, path = named_word(word)
    return name, Path(path)


def named_word(word: str) -> tuple[str, str]:
    """:func:`named_path` with the path as it is written: ``./`` is none of a path's parts."""
    name, _, path = word.partition("=")
    if not path or "/" in name or os.path.lexists(word):
        return "", word
    return name, path


def listed_paths(words: str) -> list[str]:
    """``PATH,PATH,...`` of the command line; what exists as it stands is one path."""
    return [words] if os.path.lexists(words) else words.split(",")
