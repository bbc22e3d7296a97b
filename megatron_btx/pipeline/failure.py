"""Why a stage failed, written to ``error.json``. Imports no torch."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_btx.errors import UserError
from megatron_btx.files import FULL, WRITE_FIXES, unfinished, write_json

_SAYS_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large")
"""An error that came from another process, or from another language, is text."""
_SAYS_UNWRITTEN = re.compile(r"iostream error|PytorchStreamWriter failed|unexpected pos \d+ vs \d+")
"""What torch says when a file could not be written: it does not say why."""


def leave(directory: Path, rank: int, error: Exception) -> Exception:
    """Write ``error.json`` unless another rank was first.

    Returns:
        The error as a person should see it: a disk that is full is a ``UserError``, whoever says
        it in whichever words.
    """
    error = as_seen(directory, error)
    user = isinstance(error, UserError)
    text = str(error) if user else f"{type(error).__name__}: {error}"
    record = {"kind": "user" if user else "crash", "rank": rank, "message": text}
    if not (directory / "error.json").exists():
        try:
            write_json(directory / "error.json", record)
        except OSError as problem:
            sys.stderr.write(f"{directory / 'error.json'}: {problem}\n")
    return error


def as_seen(directory: Path, error: Exception) -> Exception:
    """The error of a full or failing disk that caused ``error``, else ``error``."""
    chain = list(_chain(error))
    texts = [str(link) for link in chain if not isinstance(link, UserError)]
    full = any(isinstance(link, OSError) and link.errno in FULL for link in chain)
    unwritten = next((found for text in texts if (found := _SAYS_UNWRITTEN.search(text))), None)
    if full or any(map(_SAYS_FULL.search, texts)) or (unwritten and not has_space(directory)):
        return UserError(str(directory), "no space left on its disk", "free some and run again")
    if unwritten:
        what = f"a file could not be written (torch: {unwritten[0]}): the disk is full or failing"
        return UserError(str(directory), what, "see `df` and the system's log, and run again")
    return error


_PLACE = "or give another place (a recipe's `run_dir:`)"
_WHILE_READ = "leave the files alone while they are used, and start again"
_FIXES = {
    **{number: f"{fix}, {_PLACE}" for number, fix in WRITE_FIXES.items()},
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), "correct the path"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ESTALE), _WHILE_READ),
    errno.EEXIST: f"move it away, {_PLACE}",
    errno.EIO: "see the disk and the system's log, and start again",
}
"""What a person can do about a disk that refuses, a path that cannot be, and a file that went away
behind a command that had found it."""


def of_system(error: OSError) -> UserError | None:
    """What the system says of a file as a user's error; ``None``: it is about no file, or nothing
    that a person can put right."""
    fix = _FIXES.get(error.errno or 0)
    named = error.filename is not None or error.errno in FULL
    if fix is None or not named:
        return None
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        named_path = Path(str(error.filename))
        for place in (named_path, *named_path.parents):
            if place.is_file():
                what = "is a file, where a directory should be"
                return UserError(str(place), what, f"move it away, {_PLACE}")
    return UserError(str(error.filename or "the disk"), str(error.strerror).lower(), fix)


def has_space(directory: Path) -> bool:
    """Whether a megabyte can be written there."""
    trial = unfinished(directory / "space")
    try:
        with trial.open("wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return False
    finally:
        trial.unlink(missing_ok=True)
    return True


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
