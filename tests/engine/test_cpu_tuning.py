"""The two choices for a CPU rank: what they do, and that they change no value."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from megatron_btx import cpu_info
from megatron_btx.engine import cpu_tuning

STEPS = """
import resource, sys, torch
from megatron_btx.engine import cpu_tuning
kept = cpu_tuning.keep_memory() if sys.argv[1] == "keep" else None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        tensors = [torch.ones(200_000 + 100 * i) for i in range(50)]  # 40 MB
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""


def steps(how: str) -> tuple[str, int]:
    chosen = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    clean = {name: text for name, text in os.environ.items() if not name.startswith(chosen)}
    if how == "leave":  # glibc starts with this; chosen, it does not drift with what was freed
        clean["MALLOC_MMAP_THRESHOLD_"] = str(128 << 10)
    command = [sys.executable, "-c", STEPS, how]
    out = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    kept, faults = out.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 MB five times: the kernel clears some 50,000 pages (of 4 KiB), or none again."""
    kept, faults = steps("keep")
    assert kept == "True"
    assert faults < 1000
    assert steps("leave")[1] > faults + 1000
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1000")  # the user has chosen
    assert not cpu_tuning.keep_memory()


def test_products_keep_every_bit() -> None:
    """As the conftest's ``cpu.install()`` left this process."""
    assert not cpu_tuning.rounds_fp32()
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu_tuning.rounds_fp32()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has chosen nothing, on another maker's processor with AVX-512."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(cpu_info, "has_avx512_without_mkl", lambda: True)
    monkeypatch.setattr(cpu_tuning, "rounds_fp32", lambda: False)
    yield monkeypatch
    torch.set_float32_matmul_precision(before)


def test_onednn_where_it_keeps_every_bit(fresh: pytest.MonkeyPatch) -> None:
    assert cpu_tuning.multiply_with_onednn()
    assert cpu_tuning.onednn_multiplies(torch.float32)


def test_not_where_it_rounds(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(cpu_tuning, "rounds_fp32", lambda: True)
    assert not cpu_tuning.multiply_with_onednn()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not cpu_tuning.onednn_multiplies(torch.float32)
    assert cpu_tuning.onednn_multiplies(torch.bfloat16)


@pytest.mark.parametrize("reason", ["processor", "chosen"])
def test_not_where_it_does_not_apply(fresh: pytest.MonkeyPatch, reason: str) -> None:
    if reason == "processor":
        fresh.setattr(cpu_info, "has_avx512_without_mkl", lambda: False)
    else:
        torch.set_float32_matmul_precision("high")
    before = torch.get_float32_matmul_precision()
    assert not cpu_tuning.multiply_with_onednn()
    assert torch.get_float32_matmul_precision() == before
