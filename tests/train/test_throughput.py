"""Numbers of a step, from known ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_btx.train import throughput
from megatron_btx.train.throughput import Device, Stopwatch


def test_mfu_times_the_peak_is_flops() -> None:
    """8 ranks of 989 TFLOP/s, 4M tokens in 10 s at 46 GFLOP a token."""
    device = Device(flops_per_token=46_000_000_000, world_size=8, peak_tflops=989.0)
    found = throughput.of_step(device, 4_000_000, 10.0, {"data_loading": 0.5, "optimizer": 1.0})
    assert found["throughput/device/TPS"] == 50_000.0
    assert found["throughput/device/flopsPS"] == 2.3e15
    assert found["throughput/device/MFU"] * 989e12 == pytest.approx(2.3e15)
    assert found["throughput/device/data loading (%)"] == 5.0
    assert found["time_metrics/optimizer(s)"] == 1.0
    assert found["time_metrics/end_to_end(s)"] == 10.0


def test_without_a_peak_there_is_no_mfu() -> None:
    found = throughput.of_step(Device(flops_per_token=5), 10, 1.0, {})
    assert "throughput/device/MFU" not in found
    assert found["throughput/device/flopsPS"] == 50.0
    assert "throughput/device/flopsPS" not in throughput.of_step(Device(), 10, 1.0, {})


def test_parts_of_a_step() -> None:
    watch = Stopwatch()
    assert list(watch.waiting(iter([1, 2, 3]))) == [1, 2, 3]
    watch.lap("forward_backward")
    watch.lap("optimizer")
    assert set(watch.seconds) == {"data_loading", "forward_backward", "optimizer"}
    assert all(seconds >= 0 for seconds in watch.seconds.values())


def test_a_checkpoints_speed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    found = throughput.of_checkpoint("save", tmp_path, 0.5)
    assert found == {
        "train/checkpoint_save_duration_s": 0.5,
        "train/checkpoint_save_GB": 0.003,
        "train/checkpoint_save_GBps": pytest.approx(0.006),
    }
