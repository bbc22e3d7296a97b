"""One writer per result, and nothing that is not ours is touched."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_btx.errors import UserError
from megatron_btx.weights.directory import LargeFile, add_files, write_directory
from megatron_btx.weights.file_hashes import HASHES, difference, hashes_of
from tests.bad import PAGE, fill

HOLD = """
import sys
from pathlib import Path
from megatron_btx.weights.directory import LargeFile, write_directory

def write(file):
    file.write(b"first")
    print("writing", flush=True)
    sys.stdin.readline()

write_directory(Path(sys.argv[1]), identity="1", large_files=[LargeFile("a", 1, write)], files=dict)
"""


def piece(content: bytes) -> LargeFile:
    return LargeFile("a", 1, lambda file: file.write(content))


def put(out: Path, content: bytes = b"mine", identity: str = "1") -> None:
    write_directory(out, identity=identity, large_files=[piece(content)], files=dict)


@pytest.fixture
def writer(tmp_path):
    """Another process that is in the middle of writing ``out``."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_writer_is_told_who_the_first_is(tmp_path, writer):
    for identity in ("1", "2"):  # the same plan, and another
        with pytest.raises(UserError, match="is being written by another process") as caught:
            put(tmp_path / "out", identity=identity)
        said = str(caught.value)
        assert f"pid {writer.pid} on {os.uname().nodename}, since 20" in said
    writer.communicate("go on\n", timeout=600)
    assert writer.returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["a", HASHES]
    assert (tmp_path / "out" / "a").read_bytes() == b"first"


def test_what_a_killed_writer_held_is_free(tmp_path, writer):
    writer.kill()
    writer.wait()
    put(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert (tmp_path / "out" / "a").read_bytes() == b"mine"


def test_a_partial_directory_of_an_older_version_is_taken_over(tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / ".btx-identity").write_text("1")
    (partial / "a").write_bytes(b"done before")
    put(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_bytes() == b"done before"
    assert sorted(os.listdir(tmp_path / "out")) == ["a", HASHES]


@pytest.mark.parametrize("kind", ["directory", "empty", "file", "link", "dangling"])
def test_a_partial_of_the_users_is_left_alone(tmp_path, kind):
    partial, elsewhere = tmp_path / "out.partial", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".btx-identity").write_text("1")
    if kind in ("directory", "empty"):
        partial.mkdir()
    if kind == "directory":
        (partial / "thesis.tex").write_text("years")
    elif kind == "file":
        partial.write_text("years")
    elif kind in ("link", "dangling"):
        partial.symlink_to(elsewhere if kind == "link" else tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="was not written by btx"):
        put(tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["directory", "file", "dangling"])
def test_what_exists_is_refused(tmp_path, kind):
    out = tmp_path / "out"
    {
        "directory": out.mkdir,
        "file": out.touch,
        "dangling": lambda: out.symlink_to(tmp_path / "nowhere"),
    }[kind]()
    with pytest.raises(UserError, match="exists already"):
        put(out)
    assert os.listdir(tmp_path) == ["out"]


def test_what_appears_meanwhile_is_not_replaced_and_the_work_is_kept(tmp_path):
    out = tmp_path / "out"

    def write(file) -> None:
        file.write(b"hours of work")
        out.mkdir()

    with pytest.raises(UserError, match="exists already"):
        write_directory(out, identity="1", large_files=[LargeFile("a", 1, write)], files=dict)
    assert os.listdir(out) == []
    out.rmdir()
    put(out)
    assert (out / "a").read_bytes() == b"hours of work"


def test_what_cannot_be_read_back_gets_no_name(tmp_path):
    def refuse(directory: Path) -> None:
        assert (directory / HASHES).exists()
        raise UserError(str(directory), "cannot be read")

    with pytest.raises(UserError, match="cannot be read"):
        write_directory(
            tmp_path / "out", identity="1", large_files=[piece(b"x")], files=dict, check=refuse
        )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_full_disk_leaves_nothing_that_was_begun(disk, left):
    place = disk("nr_blocks=16")
    fill(place)
    os.truncate(place / "filler", (place / "filler").stat().st_size - left * PAGE)
    with pytest.raises(UserError, match=f"^{place}.*(cannot be written|are free)"):
        put(place / "out", bytes(PAGE + 1))
    assert os.listdir(place) == ["filler"]
    (place / "filler").unlink()
    put(place / "out", bytes(PAGE + 1))


def test_what_is_added_on_a_full_disk_leaves_what_was_there(disk):
    """A card that `btx verify --record` writes anew."""
    out = disk("nr_blocks=32") / "out"
    put(out)
    add_files(out, {"README.md": b"the card"})
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    fill(out.parent)
    with pytest.raises(OSError, match=r"No space.*README.md"):
        add_files(out, {"README.md": bytes(2 * PAGE + 1)})
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


def test_killed_while_it_claims_a_name_it_leaves_nothing_for_ever(tmp_path):
    left = tmp_path / ".out.partial.123.tmp"
    left.mkdir()
    (left / ".btx-lock").write_text("")
    (tmp_path / ".out.partial.122.tmp").mkdir()  # before its mark was there
    foreign = tmp_path / ".out.partial.124.tmp"
    foreign.mkdir()
    (foreign / "notes.md").write_text("mine")
    put(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [".out.partial.124.tmp", "out"]


AT_CALL = """
import os, signal, sys
from pathlib import Path
from megatron_btx.cli.main import interruptible
from megatron_btx.weights.directory import LargeFile, add_files, write_directory

out, number, left = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
watched = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open", "fcntl.flock")

def hook(event, arguments):
    global left
    if event in watched and (event == "fcntl.flock" or "out" in str(arguments[0])):
        left -= 1
        if not left:
            os.kill(os.getpid(), number)

write = LargeFile("a", 1, lambda file: file.write(b"mine"))
sys.addaudithook(hook)
with interruptible(once=True):
    if sys.argv[4] == "write":
        write_directory(out, identity="1", large_files=[write], files=dict)
    else:
        add_files(out, {"README.md": b"new", "verification.json": b"new"})
sys.exit(3 if left > 0 else 0)
"""
"""Write a directory, or add to one, with a signal just before the n-th call to the system."""


def signalled(out: Path, what: str, number: signal.Signals) -> Iterator[None]:
    """After a signal at each of its calls."""
    for call in range(1, 100):
        words = [sys.executable, "-c", AT_CALL, str(out), str(int(number)), str(call), what]
        done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode == 3:
            assert call > 5, "it makes several calls"
            return
        assert (done.returncode, done.stderr) in ((130, ""), (-signal.SIGKILL, "")), call
        yield
    raise AssertionError("it makes no hundred calls")


def test_a_wish_to_stop_at_any_moment_leaves_a_whole_result_or_what_goes_on(tmp_path):
    out = tmp_path / "out"
    for _ in signalled(out, "write", signal.SIGTERM):
        left = os.listdir(tmp_path)
        assert left in ([], ["out"], ["out.partial"])
        if left == ["out"]:
            assert sorted(os.listdir(out)) == ["a", HASHES]
        for directory in left:
            shutil.rmtree(tmp_path / directory)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_while_files_are_added_it_leaves_none_that_looks_damaged(tmp_path, number):
    """As `btx verify` sees it, and `btx verify --record` puts the rest right."""
    out = tmp_path / "out"
    put(out)
    add_files(out, {"README.md": b"old", "verification.json": b"old"})
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    for _ in signalled(out, "add", number):
        hashes = hashes_of(out)
        assert "a" in hashes
        assert not [name for name in hashes if difference(out / name, hashes[name])]
        for name in set(os.listdir(out)) - set(before):
            assert name.endswith(".tmp"), name
            assert number is signal.SIGKILL
            (out / name).unlink()
        for name, content in before.items():
            (out / name).write_bytes(content)


INTERRUPT = """
import sys, time
from pathlib import Path
from megatron_btx.cli.main import interruptible
from megatron_btx.mix import offline
from megatron_btx.weights.directory import LargeFile, write_directory

def write(file):
    print("writing", flush=True)
    for _ in range(6000):
        file.write(b"x")
        time.sleep(0.1)

with interruptible(once=True), offline.goes_on(Path(sys.argv[1])):
    files = [LargeFile("a", 1, write)]
    write_directory(Path(sys.argv[1]), identity="1", large_files=files, files=dict)
"""


@pytest.mark.parametrize("more", [0, 1, 20])
def test_an_interrupt_ends_it_in_order_and_others_change_nothing(tmp_path, more):
    words = [sys.executable, "-c", INTERRUPT, str(tmp_path / "out")]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "writing\n"
    for _ in range(1 + more):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.01)
        if process.poll() is not None:
            break
    _, said = process.communicate(timeout=600)
    assert process.returncode in (130, -signal.SIGINT)  # the second while Python itself ends
    told = "interrupted: the same command goes on from the finished files\n"
    assert said in ([told] if more < 2 else ["", told])  # the third ends it at once
    put(tmp_path / "out")
