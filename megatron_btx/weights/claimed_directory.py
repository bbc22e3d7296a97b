"""``NAME.partial``: where one process at a time makes what will be ``NAME``.

The directory carries our mark, a file that its writer keeps locked (flock: the kernel lets go of it
however the writer ends). Nothing without the mark is written to, renamed or deleted; whoever finds
the mark locked is told who holds it.
"""

from __future__ import annotations

import contextlib
import datetime
import glob
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_btx.errors import UserError, shown
from megatron_btx.files import (
    not_written,
    remove_tree,
    sync_directory,
    try_lock,
    undisturbed,
    unfinished,
)

MARK = ".btx-lock"
_IDENTITY = ".btx-identity"


@dataclass(frozen=True)
class Partial:
    """A directory that this process alone writes to."""

    path: Path
    out: Path

    @classmethod
    def of(cls, out: Path) -> Partial:
        """That in which ``out`` is made."""
        return cls(out.with_name(out.name + ".partial"), out)

    def finish(self, inner: str = "") -> None:
        """Give it its own name; or ``inner``, a directory in it, and delete what is beside that.

        Raises:
            UserError: something else has got that name meanwhile.
        """
        _refuse_existing(self.out)
        (self.path / _IDENTITY).unlink()
        sync_directory(self.path)
        with undisturbed():  # a result is whole and holds nothing of ours, or it is not there
            os.rename(self.path / inner, self.out)
            if inner:
                self.discard()
            else:
                (self.out / MARK).unlink()
            sync_directory(self.out.parent)

    def discard(self) -> None:
        """Delete it."""
        remove_tree(self.path)


@contextlib.contextmanager
def claimed(out: Path, identity: str) -> Iterator[Partial]:
    """``out``'s partial directory for this process, with what an interrupted writer of the same
    identity left in it, else empty.

    Raises:
        UserError: ``out`` exists, or another process writes it; there is something of that name
            that is not ours; or it cannot be made.
    """
    partial = Partial.of(out)
    with contextlib.ExitStack() as held:
        with unwritable(out):
            held.enter_context(_claim(partial))
            if _text(partial.path / _IDENTITY) != identity:
                try:
                    _empty(partial.path)
                    write_small(partial.path / _IDENTITY, identity.encode())
                except BaseException:
                    partial.discard()
                    raise
        yield partial


@contextlib.contextmanager
def unwritable(out: Path) -> Iterator[None]:
    """What the system says against writing ``out``, in a user's words."""
    try:
        yield
    except OSError as error:
        raise not_written(out, error) from error


def _claim(partial: Partial) -> IO[str]:
    """The mark, locked. The directory appears with its mark locked, so there is no moment at which
    two processes could both take it for theirs."""
    for _ in range(20):
        _refuse_existing(partial.out)
        if not os.path.lexists(partial.path):
            if file := _made(partial.path):
                return file
        elif _is_ours(partial.path) and (file := _locked(partial)):
            return file
        time.sleep(0.1)  # another process is making it, or giving it its name
    raise UserError(
        str(partial.path),
        "exists and was not written by btx (it does not hold our mark), so it is left alone",
        "move it away, or give another name",
    )


def _made(path: Path) -> IO[str] | None:
    """A new directory with its mark, locked; ``None`` where another process was faster."""
    _sweep(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(path)
    with contextlib.ExitStack() as undone:
        undone.callback(_remove, temporary)
        try:
            temporary.mkdir(exist_ok=True)
            file = (temporary / MARK).open("w+", encoding="utf-8")
            undone.callback(_close, file)
            try_lock(file)
            _sign(file)
            os.rename(temporary, path)
        except OSError as error:
            # Or another's sweep has met it before its mark was there.
            if isinstance(error, FileNotFoundError) or os.path.lexists(path):
                return None
            raise
        undone.pop_all()
    return file


def _locked(partial: Partial) -> IO[str] | None:
    """The mark of a directory that is there, locked; ``None`` where it went away meanwhile.

    Raises:
        UserError: another process has it.
    """
    try:
        file = os.fdopen(os.open(partial.path / MARK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW), "r+")
    except FileNotFoundError:
        return None
    try:
        if not try_lock(file):
            raise UserError(
                str(partial.out),
                f"is being written by another process: {_signed(file)}",
                "wait for it or end it, or give another name",
            )
        now = os.stat(partial.path / MARK)
        if not os.path.samestat(now, os.fstat(file.fileno())):
            raise FileNotFoundError
        _sign(file)
    except FileNotFoundError:  # it was finished, and what is there now is another's
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file


def _is_ours(path: Path) -> bool:
    """Whether the mark is in it, or that of versions before there were locks."""
    if path.is_symlink():
        return False
    for name in (MARK, _IDENTITY):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.lstat(path / name).st_mode):
                return True
    return False


def _sign(file: IO[str]) -> None:
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    who = {"pid": os.getpid(), "host": os.uname().nodename, "started": now}
    file.seek(0)
    file.truncate()
    json.dump(who, file)
    file.flush()


def _signed(file: IO[str]) -> str:
    try:
        who = json.loads(file.read(1000))
        return shown(f"pid {who['pid']} on {who['host']}, since {who['started']}")
    except (ValueError, KeyError, TypeError):
        return "one that has not signed"


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise UserError(str(out), "exists already", "remove it, or give another name")


def _empty(path: Path) -> None:
    """Delete what another plan left in a directory of ours."""
    for entry in path.iterdir():
        if entry.name == MARK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sweep(path: Path) -> None:
    """Delete what was killed while it made ``path``: directories with at most a mark in them."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            left.rmdir()
        with contextlib.suppress(OSError), (left / MARK).open("r+") as file:
            if try_lock(file):
                _remove(left)


def _close(file: IO[str]) -> None:
    with contextlib.suppress(OSError):  # on a full disk it fails again
        file.close()


def _remove(directory: Path) -> None:
    with undisturbed(), contextlib.suppress(OSError):
        (directory / MARK).unlink(missing_ok=True)
        directory.rmdir()


def write_small(path: Path, content: bytes) -> None:
    """Under its own name at once (unlike ``files.written``): the directory's name is what says that
    a file is whole, and a run that is killed must not leave others in it."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
