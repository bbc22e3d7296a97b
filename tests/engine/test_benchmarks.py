"""The benchmarks of training run to their end where they can: small, on a CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
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
        timeout=3600,  # on a busy machine some ten processes take their time
    )


def only_line(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_gpu_check_tiny_on_a_cpu(tmp_path: Path) -> None:
    """Every branch: torch's layers stand in for Transformer Engine's."""
    done = run(
        "gpu_check.py", "--device", "cpu", "--tiny", "--steps", "3", "--folder", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(line["seconds"] >= 0 for line in lines)
    assert not list(tmp_path.iterdir())
    steps = ["small", "train", "profile", "save", "resume"]
    for layers, before in (("torch", steps), ("stand_in", [])):
        own = [line for line in lines if line.get("layers") == layers and "of" not in line]
        assert [line["check"] for line in own] == [*before, *steps, "balance", "moves"]
        for line in own:
            if line["check"] == "train":
                assert line["tokens_per_second"] > 0
                assert line["mfu"] is None
            if line["check"] == "profile":
                assert len(line["most"]) == 10
                assert line["most"][0][1] > 0
            if line["check"] == "save":
                assert line["save_GB"] > 0
            if line["check"] == "resume":
                assert line["resume_difference"] == 0
        natural, forced = (line for line in own if "load_max_over_mean" in line)
        assert forced["load_max_over_mean"] < natural["load_max_over_mean"]
    agreed = [line for line in lines if line["check"] == "agreement"]
    for name, number in (
        ("loss_to_cpu", 3),
        ("grad_norm_to_cpu", 3),
        ("bf16_to_cpu_fp32", 3),
        ("bf16_to_torch", 1),
        ("to_its_saver", 2),
    ):
        found = [line[name] for line in agreed if name in line]
        assert len(found) == number
        assert all(0 < one < 2e-2 if name == "bf16_to_cpu_fp32" else one == 0 for one in found)
    (demo,) = (line for line in lines if line["check"] == "demo")
    assert {"seed", "expert:code", "btx"} <= set(demo["loss"])


def test_gpu_check_names_what_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu_check = importlib.import_module("gpu_check")
    gpu_models = importlib.import_module("gpu_models")
    small = {"check": "small", "layers": "torch", "model": "moe", "two_more": [3.0, 2.9]}
    small |= {"steps": [[3.2, 1.0], [3.1, 1.0]]}
    train = {"check": "train", "layers": "torch", "model": "moe", "losses": [10.0, 9.0, 8.0]}
    train |= {"first_sequence": 10.0}
    other = [{**line, "layers": "transformer_engine"} for line in (small, train)]
    other[1] |= {"losses": [10.0, 9.1, 8.0]}
    moved = {"check": "moves", "layers": "transformer_engine", "model": "moe", "from": "torch"}
    moved |= {"two_more": [3.0, 2.8]}
    cpu = {"moe": {"steps": [[3.2, 1.0], [3.1, 1.1]], "large": 10.1}}
    lines = list(gpu_check.agreement([small, train, *other, moved], cpu))
    failed = [(line["layers"], line["failed"]) for line in lines if "failed" in line]
    assert failed == [
        ("torch", "grad_norm_to_cpu is over its limit"),
        ("torch", "bf16_to_cpu_fp32 is over its limit"),
        ("transformer_engine", "grad_norm_to_cpu is over its limit"),
        ("transformer_engine", "bf16_to_cpu_fp32 is over its limit"),
        ("transformer_engine", "bf16_to_torch is over its limit"),
        ("transformer_engine", "to_its_saver is over its limit"),
    ]

    def breaks() -> Iterator[tuple[str, dict]]:
        yield "small", {}
        raise MemoryError("CUDA out of memory")

    said = list(gpu_models.guarded(breaks(), model="moe"))
    assert said[1] == ("error", {"model": "moe", "failed": "MemoryError: CUDA out of memory"})


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


def test_a_step_without_one_of_our_operations() -> None:
    """The one of which most of the rest has to know."""
    chosen = ("--case", "moe-demo", "--without", "experts", "--rounds", "1", "--threads", "1")
    found = only_line(run("cpu_kernels.py", *chosen))
    assert (found["case"], found["without"]) == ("moe-demo", "experts")
    assert found["ratio"] > 0
