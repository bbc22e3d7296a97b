"""Ranks that are forked, seen from outside: they must be what a process of their own would be."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_btx.pipeline.local import launch, reaper
from megatron_btx.pipeline.local.launch import ForkServer, Launcher, Processes, Rank
from tests.pipeline.conftest import TINY

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
MARK = "0123456789abcdef/finetune/1"


@pytest.fixture(scope="module", params=[[], ["0"]], ids=["forked", "process"])
def launcher(request: pytest.FixtureRequest) -> Iterator[Launcher]:
    gpus = request.param
    made = launch.launcher_here(gpus)
    assert isinstance(made, Processes if gpus else ForkServer)
    yield made
    made.close()
    reaper.kill_marked(MARK)


@pytest.fixture
def start(tmp_path: Path) -> Callable[[Launcher], Rank]:
    """Start the second rank of a stage whose first one never comes: it waits, with nothing done."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {TINY}\nrun_dir: {tmp_path / 'run'}\n")

    def begin(launcher: Launcher) -> Rank:
        environment = {
            **{name: value for name, value in os.environ.items() if name != "BTX_ATTEMPT"},
            reaper.MARK: MARK,
            "BTX_PARENT": str(os.getpid()),
            "BTX_INIT_METHOD": f"file://{tmp_path / 'ranks'}",
            "RANK": "1",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "2",
        }
        return launcher.start((str(recipe), "finetune"), environment, tmp_path / "log")

    return begin


def words(process: psutil.Process) -> list[str]:
    """Of its command line; one that has ended has none."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def found(rank: Rank) -> psutil.Process:
    """The process of a rank, once it is there."""
    deadline = time.monotonic() + 600
    while rank.poll() is None and time.monotonic() < deadline:
        began: Any = getattr(rank, "process", rank)
        if began is not None:
            process = psutil.Process(began.pid)
            shown = any("finetune" in word for word in words(process))
            if shown and reaper.marked(MARK) == [process.pid]:
                return process
        time.sleep(0.02)
    raise AssertionError(f"no rank: {rank.returncode}")


def server_beside(rank: psutil.Process) -> psutil.Process:
    """The process that has forked a rank, or is to: one that has just begun shows no words yet."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        for child in psutil.Process().children():
            if child != rank and any("fork_server" in word for word in words(child)):
                return child
        time.sleep(0.001)
    raise AssertionError("no server")


def ended(rank: Rank) -> int:
    """Its exit code."""
    deadline = time.monotonic() + 600
    while rank.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert rank.returncode is not None
    return rank.returncode


def test_a_rank_is_a_process_of_this_one(
    launcher: Launcher, start: Callable[[Launcher], Rank], tmp_path: Path
) -> None:
    rank = start(launcher)
    process = found(rank)
    assert process.ppid() == os.getpid()
    assert os.getsid(process.pid) == process.pid
    assert os.readlink(f"/proc/{process.pid}/fd/0") == os.devnull
    assert os.readlink(f"/proc/{process.pid}/fd/1") == str(tmp_path / "log")
    assert os.readlink(f"/proc/{process.pid}/fd/2") == str(tmp_path / "log")
    assert "recipe.yaml" in " ".join(process.cmdline())
    assert process.environ()["PATH"] == os.environ["PATH"]  # the environment is still readable
    assert rank.poll() is None
    rank.send_signal(signal.SIGTERM)
    assert ended(rank) == -signal.SIGTERM
    assert not reaper.marked(MARK)
    rank.send_signal(signal.SIGTERM)  # is for nobody now


def test_its_exit_code_and_its_words(
    launcher: Launcher, start: Callable[[Launcher], Rank], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text("name: [")
    assert ended(start(launcher)) == 2
    assert "recipe.yaml" in (tmp_path / "log").read_text()


def test_one_thread_where_ranks_are_forked(
    launcher: Launcher, start: Callable[[Launcher], Rank]
) -> None:
    """A pool of threads, and whatever lock one of them holds, would not live on in a fork."""
    rank = start(launcher)
    process = found(rank)
    if isinstance(launcher, ForkServer):
        assert server_beside(process).num_threads() == 1
    process.kill()
    assert ended(rank) == -signal.SIGKILL


def test_a_server_that_has_died(
    start: Callable[[Launcher], Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(launch.launcher_here([])) as launcher:
        first = start(launcher)
        process = found(first)
        server = server_beside(process)
        second = start(launcher)
        second.send_signal(signal.SIGTERM)  # before, while or after it is forked
        assert ended(second) in (-signal.SIGTERM, 1)  # 1: forked, and not told to begin
        with contextlib.suppress(psutil.NoSuchProcess):  # that was its end
            server.kill()
        assert not psutil.wait_procs([server], timeout=600)[1]
        assert first.poll() is None  # its ranks are not its children
        assert reaper.marked(MARK) == [process.pid]
        # The next ones begin another, which is stopped before it has imported torch: more than a
        # socket takes.
        more = [start(launcher)]
        server_beside(process).suspend()
        monkeypatch.setenv("BTX_TEST_LONG", 20_000 * "x")
        more += [start(launcher) for _ in range(50)]
        more[0].send_signal(signal.SIGKILL)
        assert {ended(one) for one in more} == {-signal.SIGKILL}
        process.terminate()
        assert ended(first) == -signal.SIGTERM


def test_where_torch_cannot_be_imported(
    start: Callable[[Launcher], Rank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong is each rank's own to find and to say."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with contextlib.closing(launch.launcher_here([])) as launcher:
        for _ in range(2):
            rank = start(launcher)
            process = found(rank)
            assert "megatron_btx.pipeline.worker" in process.cmdline()
            rank.send_signal(signal.SIGTERM)
            assert ended(rank) == -signal.SIGTERM


def test_where_the_ends_of_children_are_ignored(start: Callable[[Launcher], Rank]) -> None:
    """As a shell's ``trap '' CHLD`` hands it on."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with contextlib.closing(launch.launcher_here([])) as launcher:
            rank = start(launcher)
            found(rank).terminate()
            assert ended(rank) == 0  # how it ended is lost; that it has is not
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_threads_after_a_fork() -> None:
    """What is forked has as many as it asks for, whatever the server was told and has computed."""
    program = (
        "import os, signal\n"
        "from megatron_btx.pipeline.local import fork_server\n"
        "assert fork_server.preload()\n"
        "import torch\n"
        "from megatron_btx.engine import cpu_tuning\n"
        "assert torch.get_num_threads() == 1\n"
        "cpu_tuning.rounds_fp32()\n"
        "torch.rand(512, 512) @ torch.rand(512, 512)\n"
        "assert len(os.listdir('/proc/self/task')) == 1\n"
        "if os.fork() == 0:\n"
        "    torch.set_num_threads(2)\n"
        "    for dtype in (torch.float32, torch.bfloat16):\n"
        "        one = torch.rand(512, 512).to(dtype)\n"
        "        (one @ one).exp().sum()\n"
        "    os._exit(len(os.listdir('/proc/self/task')) == 1)\n"
        "assert os.wait()[1] == 0\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=600)
