"""Numbers of a step under the names in use: OLMo-core's ``throughput/device/...``, torchtitan's
``time_metrics/...`` and ``memory/...``.

FLOPs are model FLOPs (recipe/count.py): recomputation is not counted, so MFU is that of PaLM
(arXiv 2204.02311, appendix B). ``MFU`` is a share: MFU times the peak is ``flopsPS``.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist

from megatron_btx.recipe import chips

T = TypeVar("T")

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What one rank computes with, and what a token costs."""

    flops_per_token: int = 0
    """Of training; 0 where it is not known."""
    world_size: int = 1
    peak_tflops: float | None = None
    """Of one rank; ``None``: MFU is not known."""


def device(flops_per_token: int, world_size: int, peak_tflops: float | None) -> Device:
    """This job's, the peak looked up by the GPU's name unless it is given."""
    if peak_tflops is None and torch.cuda.is_available():
        peak_tflops = chips.peak_tflops(torch.cuda.get_device_name())
    return Device(flops_per_token=flops_per_token, world_size=world_size, peak_tflops=peak_tflops)


@dataclass(slots=True)
class Stopwatch:
    """Seconds of a step by part, on this rank. On a GPU a part ends where the step waits for it
    anyway: the loss is read after the last backward pass, the gradient's norm after the update."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches; the time that they take is ``data_loading``."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            spent = time.perf_counter() - started
            self.seconds["data_loading"] = self.seconds.get("data_loading", 0.0) + spent
            if batch is None:
                return
            yield batch

    def lap(self, part: str) -> None:
        """What has passed since the last one was ``part``, but for the wait for data."""
        now = time.perf_counter()
        self.seconds[part] = now - self._last
        if part == "forward_backward":
            self.seconds[part] -= self.seconds.get("data_loading", 0.0)
        self._last = now


@dataclass(slots=True)
class Waiting:
    """Seconds in which this process waited for collective operations."""

    seconds: float = 0.0


@contextmanager
def waiting_counted() -> Iterator[Waiting]:
    """Within the block, count how long this rank waits for others. The rest of a step is its own
    work: all ranks of a synchronous step take the same time, and only the slowest never waits.

    Whatever blocks on gloo goes through ``Work.wait``: collectives, coalesced or not, and what
    pipeline stages send each other. On a GPU ``wait`` only queues and returns at once, so nothing
    is counted there.
    """
    found, plain = Waiting(), dist.Work.wait

    def wait(work: dist.Work, *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return plain(work, *arguments, **options)
        finally:
            found.seconds += time.perf_counter() - started

    with mock.patch.object(dist.Work, "wait", wait):
        yield found


def of_step(
    device: Device, tokens: int, seconds: float, parts: Mapping[str, float]
) -> dict[str, float]:
    """Of one optimizer step.

    Args:
        device: of a rank.
        tokens: of the step, over all ranks.
        seconds: of the step.
        parts: of them, by part.
    """
    tps = tokens / seconds / device.world_size
    found = {"throughput/device/TPS": tps}
    if device.flops_per_token:
        found["throughput/device/flopsPS"] = tps * device.flops_per_token
        if device.peak_tflops:
            found["throughput/device/MFU"] = (
                tps * device.flops_per_token / (device.peak_tflops * 1e12)
            )
    if "data_loading" in parts:
        found["throughput/device/data loading (%)"] = 100 * parts["data_loading"] / seconds
    found |= {f"time_metrics/{name}(s)": value for name, value in parts.items()}
    found["time_metrics/end_to_end(s)"] = seconds
    return found | memory()


def memory() -> dict[str, float]:
    """Peaks since the start of this rank, GiB."""
    if torch.cuda.is_available():
        return {
            "memory/max_active(GiB)": torch.cuda.max_memory_allocated() / GIB,
            "memory/max_reserved(GiB)": torch.cuda.max_memory_reserved() / GIB,
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"memory/max_resident(GiB)": peak / GIB}


def of_checkpoint(what: str, directory: Path, seconds: float) -> dict[str, float]:
    """``what`` is ``save`` or ``load``: seconds, and GB/s over all ranks' files."""
    files = (file for file in directory.rglob("*") if file.is_file())
    return of_transfer(what, sum(file.stat().st_size for file in files), seconds)


def of_transfer(what: str, size: int, seconds: float) -> dict[str, float]:
    """Likewise, of ``size`` bytes."""
    return {
        f"train/checkpoint_{what}_duration_s": seconds,
        f"train/checkpoint_{what}_GB": size / 1e9,
        f"train/checkpoint_{what}_GBps": size / 1e9 / max(seconds, 1e-9),
    }
