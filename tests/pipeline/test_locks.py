"""Who may work in a run's directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_btx.errors import UserError
from megatron_btx.pipeline import locks
from tests.bad import fill


def _refused(place: Path, words: str) -> None:
    with pytest.raises(UserError, match=words), locks.run_lock(place):
        pass


def test_the_second_is_told_who_the_first_is(tmp_path: Path) -> None:
    with locks.run_lock(tmp_path):
        _refused(tmp_path, f"process {os.getpid()} on ")
    with locks.run_lock(tmp_path):
        pass


def test_since_when_a_run_is_at_work(tmp_path: Path) -> None:
    """It is read, not asked: to ask for the lock would be to hold it."""
    assert locks.run_since(tmp_path) is None
    with locks.run_lock(tmp_path):
        assert locks.run_since(tmp_path) == (tmp_path / "lock").stat().st_mtime
        _refused(tmp_path, "another btx is at work")
    assert locks.run_since(tmp_path) is None
    gone = f"process {2**22 + 1} on {os.uname().nodename}"  # no system has so many
    for left, seen in (("", False), ("\0torn", False), (gone, False), ("process 1 on far", True)):
        (tmp_path / "lock").write_text(left)
        assert (locks.run_since(tmp_path) is not None) is seen


@pytest.mark.parametrize("left", [b"", b"process 1 on gone", b"\xff\xfe\x00torn"])
def test_what_a_dead_owner_wrote_locks_nobody_out(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "lock").write_bytes(left)
    with locks.run_lock(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
        with (tmp_path / "lock").open("wb") as file:
            file.write(left)
        _refused(tmp_path, "another btx is at work")


def test_a_full_disk_leaves_no_lock(disk: Callable[[str], Path]) -> None:
    place = disk("size=64k")
    fill(place)
    with pytest.raises(OSError, match="No space"), locks.run_lock(place):
        pass
    assert not (place / "lock").exists()
    (place / "lock").touch()  # of a run before this: by it its directory is known
    with pytest.raises(OSError, match="No space"), locks.run_lock(place):
        pass
    assert (place / "lock").exists()


def test_ranks_at_work_are_waited_for(tmp_path: Path) -> None:
    with contextlib.ExitStack() as ranks:
        ranks.enter_context(locks.stage_lock(tmp_path))
        ranks.enter_context(locks.stage_lock(tmp_path))
        with pytest.raises(locks.Busy, match="still at work in it"):
            locks.wait_until_idle(tmp_path, timeout=0)
    locks.wait_until_idle(tmp_path, timeout=0)


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(UserError, match="has no file locks"), locks.run_lock(tmp_path):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_another_users_run_is_named_as_such(tmp_path: Path) -> None:
    """A directory that both may write in, and its owner's lock."""
    (tmp_path / "lock").touch(mode=0o644)
    tmp_path.chmod(0o777)
    code = _lock_as_nobody(tmp_path)
    if code == 4:
        pytest.skip("there is no second user in this namespace")
    assert code == 3


def _lock_as_nobody(place: Path) -> int:
    """Exit code of a child that tries as a user without rights: 3 where it was told the owner, 4
    where there is no such user."""
    directory = os.open(place, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.fchdir(directory)
            code = 4
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            code = 1
            try:
                with locks.run_lock(Path()):
                    code = 0
            except UserError as error:
                code = 3 if "belongs to root, and you may not write" in str(error) else 2
        finally:
            os._exit(code)
    os.close(directory)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
