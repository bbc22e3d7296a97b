"""A signal to every process of a task, as srun sends it, leaves a rank able to save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

CODE = """
import signal, sys
from megatron_btx.engine import cpu
cpu.install()
from megatron_btx.engine import checkpoint
from megatron.core.dist_checkpointing.strategies import filesystem_async
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
checkpoint._start_helpers()
print("ready", flush=True)
sys.stdin.readline()
queue = filesystem_async._get_write_results_queue()
queue.put("saved")
print(queue.get(), flush=True)
"""


def test_helpers_outlive_a_wish_to_stop() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.killpg(process.pid, number)
        time.sleep(0.3)
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stdout.readline() == "saved\n"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
