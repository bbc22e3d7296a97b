"""Files that describe something: read whole, or refused by name."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import megatron_btx
from megatron_btx import files
from megatron_btx.errors import UserError
from megatron_btx.files import (
    ProgressFile,
    find_json,
    json_text,
    parse_json,
    read_json,
    undisturbed,
    write_json,
)
from megatron_btx.pipeline.failure import of_system
from tests.bad import fill

DAMAGED = [
    (b"", "is damaged, not JSON"),
    (b'{"a": 1', "is damaged, not JSON"),
    (b"[1, 2]", "no JSON object"),
    (b'{"a": 1, "a": 2}', "'a' stands there twice"),
    (b'{"a": "\xff"}', "is damaged, not JSON"),
    (b"[" * 100_000, "nested too deep"),
    (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested more than 64 deep"),
    (b'{"a": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
    (b'{"a": "\x1b[31m"}', "is damaged, not JSON"),
]


@pytest.mark.parametrize(("content", "words"), DAMAGED, ids=[row[1] for row in DAMAGED])
def test_a_damaged_one(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert words in str(caught.value)
    assert caught.value.where == str(path)
    assert find_json(path) is None


def test_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    content = {"a": [1, 2.5, None, True, {"b": "c" * 10_000}], "n": 10**99}
    path.write_text(json.dumps(content))
    assert read_json(path) == find_json(path) == content
    assert parse_json(path.read_bytes(), "header") == content


def test_a_full_disk_is_told_with_the_file(disk: Callable[[str], Path]) -> None:
    """Which a write itself does not know; and what was there stays."""
    place = disk("size=64k")
    path = place / "found.json"
    write_json(path, {"a": 1})
    fill(place)
    with pytest.raises(OSError, match="No space") as caught:
        write_json(path, {"a": ["more"] * 1000})
    error = of_system(caught.value)
    assert error is not None
    assert (error.where, error.what) == (str(path), "no space left on device")
    assert sorted(os.listdir(place)) == ["filler", "found.json"]
    assert read_json(path) == {"a": 1}


def test_what_is_no_file(tmp_path: Path) -> None:
    """Each is answered at once: a pipe without a writer does not wait, a device has no end."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    missing = tmp_path / "missing"
    places = {
        pipe: "a pipe or a device",
        Path("/dev/zero"): "a pipe or a device",
        tmp_path: "Is a directory",
        missing: "no such file",
        tmp_path / ("x" * 300): "File name too long",
        tmp_path / "a\0b": "null",
    }
    for path, words in places.items():
        with pytest.raises(UserError, match=words):
            read_json(path)
    assert find_json(missing) is None
    with pytest.raises(UserError, match="a pipe"):
        find_json(pipe)


def test_a_file_without_end(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    for read in (read_json, find_json):
        with pytest.raises(UserError, match="too large: 1,099,511,627,776 bytes"):
            read(path)
    path.write_text('{"a": 1}' + " " * 100)
    with pytest.raises(UserError, match="at most 20"):
        read_json(path, limit=20)


def test_a_wish_to_stop_is_heard_behind_what_must_not_be_left_half_done() -> None:
    done = []

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, stop)
    try:
        stopped = pytest.raises(KeyboardInterrupt)
        with stopped, undisturbed(), undisturbed():
            signal.raise_signal(signal.SIGTERM)
            done.append("all of it")
        assert done == ["all of it"]
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, former)


def test_how_far_a_stage_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first word and the last; what comes at once between them is not worth a write."""
    monkeypatch.setattr(files, "time", SimpleNamespace(monotonic=lambda: 5.0))
    progress = ProgressFile(tmp_path / "progress.json")
    for done in (0.0, 0.5):
        progress("tokens", done)
        assert find_json(progress.path) == {"what": "tokens", "done": 0.0}
    progress("tokens", 1.0, bytes_per_second=2.0)
    assert find_json(progress.path) == {"what": "tokens", "done": 1.0, "bytes_per_second": 2.0}
    progress.forget()
    progress.forget()
    assert not progress.path.exists()


def test_json_that_is_printed_is_strict() -> None:
    """Python's own writes NaN and Infinity, which other readers refuse."""
    content = {"a": [math.nan, (1.5, -math.inf)], "b": {"c": math.inf, "d": 10**30, "e": None}}
    expected = {"a": [None, [1.5, None]], "b": {"c": None, "d": 10**30, "e": None}}
    assert json.loads(json_text(content, indent=1), parse_constant=pytest.fail) == expected
    commands = list((Path(megatron_btx.__file__).parent / "cli").glob("*.py"))
    assert not [path.name for path in commands if "json.dump" in path.read_text()]
