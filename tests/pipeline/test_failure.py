"""What a stage leaves that has failed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_btx.errors import UserError
from megatron_btx.files import not_written
from megatron_btx.pipeline import failure
from tests.bad import fill


def test_the_first_rank_is_the_one_that_is_heard(tmp_path: Path) -> None:
    failure.leave(tmp_path, 3, UserError("key", "is wrong", "mend it"))
    failure.leave(tmp_path, 0, RuntimeError("lost its peer"))
    record = json.loads((tmp_path / "error.json").read_text())
    assert record == {"kind": "user", "rank": 3, "message": "key: is wrong\n  fix: mend it"}


def test_a_full_disk_is_recognised_however_deep(tmp_path: Path) -> None:
    error = RuntimeError("a checkpoint could not be saved")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert "no space left on its disk" in str(failure.leave(tmp_path, 0, error))
    text = RuntimeError("rank 1: Traceback ...\nOSError: [Errno 28] No space left on device")
    assert isinstance(failure.leave(tmp_path, 0, text), UserError)


def test_torch_says_iostream_error(disk: Callable[[str], Path]) -> None:
    """What torch raises itself on a full disk is told as what it is."""
    place = disk("size=256k")
    with pytest.raises(RuntimeError) as caught:
        torch.save(torch.zeros(1 << 20), place / "model.pt")
    fill(place)
    seen = failure.leave(place, 0, caught.value)
    assert isinstance(seen, UserError), caught.value
    assert "no space left on its disk" in str(seen)
    assert not (place / "error.json").exists()  # there was no room


def test_torch_says_it_and_there_is_room_again(tmp_path: Path) -> None:
    error = RuntimeError("basic_ios::clear: iostream error")
    assert "the disk is full or failing" in str(failure.as_seen(tmp_path, error))
    assert list(tmp_path.iterdir()) == []


def test_another_error_is_itself(tmp_path: Path) -> None:
    error = RuntimeError("loss is NaN")
    assert failure.leave(tmp_path, 0, error) is error
    assert json.loads((tmp_path / "error.json").read_text())["kind"] == "crash"


def test_what_the_system_says_of_a_file_is_the_user_s_error() -> None:
    """With what to do about it; what is about no file is a crash."""
    for number, words in (
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "change its permissions"),
        (errno.EROFS, "make it writable"),
        (errno.ENOENT, "leave the files alone"),
        (errno.EIO, "the system's log"),
    ):
        found = failure.of_system(OSError(number, os.strerror(number), "there"))
        assert found is not None
        assert found.where == "there"
        assert words in found.fix
        if number != errno.ENOENT:  # as where a result is written at once
            said = not_written(Path("there"), OSError(number, os.strerror(number)))
            assert said.fix == f"{found.fix.partition(',')[0]} or give another directory"
    assert failure.of_system(OSError(errno.ENOENT, "none")) is None
    assert failure.of_system(OSError(errno.ECONNRESET, "reset", "there")) is None


def test_a_file_where_a_directory_should_be(tmp_path: Path) -> None:
    """Leaving it alone would not help."""
    (tmp_path / "finetune").touch()
    with pytest.raises(OSError, match="directory") as caught:
        (tmp_path / "finetune" / "log").mkdir(parents=True)
    found = failure.of_system(caught.value)
    assert found is not None
    assert (found.where, "move it away" in found.fix) == (str(tmp_path / "finetune"), True)
    (tmp_path / "log").touch()
    with pytest.raises(FileExistsError) as caught:
        (tmp_path / "log").mkdir(exist_ok=True)
    found = failure.of_system(caught.value)
    assert found is not None
    assert (found.where, "move it away" in found.fix) == (str(tmp_path / "log"), True)
