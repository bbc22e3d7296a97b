"""A signal to every process of a task, as srun sends it, leaves a rank able to save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

CODE = """
import signal, sys
from megatron_btx.engine import cpu
cpu.install()
from megatron_btx.engine import checkpoint_workers
from megatron.core.dist_checkpointing.strategies import filesystem_async
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
checkpoint_workers.start()
print("ready", flush=True)
sys.stdin.readline()
names = ("get_write_results_queue", "_get_write_results_queue")  # the second in 0.16
queue = next(getattr(filesystem_async, n) for n in names if hasattr(filesystem_async, n))()
queue.put("saved")
print(queue.get(), flush=True)
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    """A rank that has started its helpers, in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", CODE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def test_helpers_end_with_a_killed_rank(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert len(helpers) >= 2
    process.kill()
    assert process.stdout.read() == ""  # closed by all that held it
    _, alive = psutil.wait_procs(helpers, timeout=600)
    assert not alive


def test_helpers_outlive_a_wish_to_stop(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.killpg(process.pid, number)
    time.sleep(0.3)
    process.stdin.write("\n")
    process.stdin.close()
    assert process.stdout.readline() == "saved\n"
    assert process.wait(120) == 0
