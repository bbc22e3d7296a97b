"""What a rank's second thread notices, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.pipeline.conftest import ROOT

CHILD = """
import signal, sys, time
from pathlib import Path
from megatron_btx.pipeline import watchdog
from megatron_btx.engine.heartbeat import HEART

signal.signal(signal.SIGUSR1, lambda *_: print("asked to save", flush=True))
watchdog._TOGETHER = watchdog._EVERY = 0.2
directory, hang, grace = sys.argv[1:]

def waits_for_ever():
    HEART.beat("step 12")
    while True:
        time.sleep(1)

dog = watchdog.Watchdog(
    directory=Path(directory), rank=0, world_size=3, grace=float(grace), hang=float(hang)
)
with dog.watching():
    waits_for_ever()
"""


def _child(
    directory: Path, hang: float, grace: float, **environment: str
) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(directory), str(hang), str(grace)],
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_hang_prints_the_stacks_and_names_who_gave_no_sign(tmp_path: Path) -> None:
    (tmp_path / "hang").mkdir()
    (tmp_path / "hang" / "rank-1.json").write_text("{}")  # of an attempt before this
    done = _child(tmp_path, hang=1, grace=60)
    assert done.returncode == 1
    assert "in waits_for_ever" in done.stderr
    record = json.loads((tmp_path / "error.json").read_text())
    assert (record["kind"], record["rank"]) == ("hang", 0)
    assert "since step 12; no sign of rank 1, 2: stopped, or its node is lost" in record["message"]


def test_a_rank_on_a_lost_node_is_asked_to_save_and_then_ended(tmp_path: Path) -> None:
    (tmp_path / "leave.json").write_text("{}")
    done = _child(tmp_path, hang=0, grace=5, SLURM_JOB_ID="7")
    assert done.returncode == 1
    assert done.stdout == "asked to save\n"
    assert not (tmp_path / "error.json").exists()
