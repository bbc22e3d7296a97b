"""benchmarks/gpu_check.py runs to its end where it can: tiny, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_check.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_tiny_on_a_cpu(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--tiny", "--steps", "3", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    for kind in ("dense", "moe"):
        assert found[kind]["loss_difference_to_cpu"] == 0
        assert found[kind]["resume_difference"] == 0
        assert found[kind]["tokens_per_second"] > 0
        assert found[kind]["mfu"] is None
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run()
    assert done.returncode == 2
    assert "no GPU" in done.stderr
