"""The benchmarks of training run to their end where they can: small, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(BENCHMARKS / script), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


def only_line(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_gpu_check_tiny_on_a_cpu(tmp_path: Path) -> None:
    done = run(
        "gpu_check.py", "--device", "cpu", "--tiny", "--steps", "3", "--folder", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    steps = ["small_against_cpu", "train", "save", "resume"]
    assert [line["check"] for line in lines] == ["device", "reference_on_the_cpu", *steps, *steps]
    assert all(line["seconds"] >= 0 for line in lines)
    for kind in ("dense", "moe"):
        found: dict = {}
        for line in lines:
            found |= line if line.get("model") == kind else {}
        assert found["loss_difference_to_cpu"] == 0
        assert 0 < found["bf16_loss_difference_to_cpu_fp32"] < 2e-2
        assert found["resume_difference"] == 0
        assert found["tokens_per_second"] > 0
        assert found["save_GB"] > 0
        assert found["mfu"] is None
    assert not list(tmp_path.iterdir())


def test_gpu_check_says_that_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("gpu_check.py")
    assert done.returncode == 2
    assert "no GPU" in done.stderr


def test_a_step_against_transformers() -> None:
    """It compares losses before it times anything."""
    pytest.importorskip("transformers")
    found = only_line(
        run("train_step.py", "--case", "dense-demo-fp32", "--rounds", "1", "--threads", "1")
    )
    assert found["ratio"] > 0
    assert found["parameters"] == 80_112
