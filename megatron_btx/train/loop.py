"""The training loop: it calls the steps and the callbacks in their order. Asked to stop by a
signal, the ranks agree on a step, save and exit."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_btx.engine.heartbeat import HEART
from megatron_btx.engine.moe.loss_tracker import pop_balance_loss
from megatron_btx.engine.optimizer import learning_rate
from megatron_btx.train import throughput
from megatron_btx.train.step import Batch, train_step
from megatron_btx.train.throughput import Device


@dataclass(kw_only=True)
class Run:
    """One training stage in progress."""

    model: torch.nn.Module
    """In Megatron's wrappers."""
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    batches: Callable[[int], Iterator[Batch]]
    """Step (from 0) -> this rank's micro-batches of it."""
    total_steps: int
    num_microbatches: int
    micro_batch_size: int
    global_batch_size: int
    seq_length: int
    masked: bool = False
    """Whether some tokens are not predicted (``eod_mask_loss``)."""
    step: int = 0
    """Optimizer steps done."""
    device: Device = field(default_factory=Device)
    stopped: bool = False
    averaged: tuple[int, ...] = ()
    """The steps whose mean the model has become, behind the last step."""
    thaws_at: int | None = None
    """Number of steps after which the frozen parameters are unfrozen."""
    thaw: Callable[[Run], None] = lambda _: None
    """Unfreezes them: another wrapper, optimizer and schedule."""

    @property
    def tokens_per_step(self) -> int:
        """Over all ranks."""
        return self.global_batch_size * self.seq_length


class Callback:
    """What may happen around a step; each hook runs on every rank, in the order of the list."""

    def at_start(self, run: Run) -> None:
        """No step has been done yet."""

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        """Step ``run.step`` has been done; ``record`` is what is known of it."""

    def at_end(self, run: Run) -> None:
        """The last step has been done, or the run was stopped."""


class NotFinite(RuntimeError):
    """The loss or the gradient is NaN or infinite."""


def train(run: Run, callbacks: Sequence[Callback], stop: StopRequest) -> None:
    """Train until the last step, or until the ranks agree to stop.

    Raises:
        NotFinite: training has diverged; nothing of that step is saved.
    """
    if run.step == 0:
        for callback in callbacks:
            callback.at_start(run)
    while run.step < run.total_steps and not run.stopped:
        started = time.perf_counter()
        rate = learning_rate(run.optimizer)
        with throughput.waiting_counted() as waited:
            result = train_step(
                run.model,
                run.optimizer,
                run.schedule,
                run.batches(run.step),
                step=run.step,
                num_microbatches=run.num_microbatches,
                micro_batch_size=run.micro_batch_size,
                seq_length=run.seq_length,
                masked=run.masked,
            )
        run.step += 1
        HEART.beat(f"step {run.step}")
        if not torch.isfinite(torch.tensor([result.loss, result.grad_norm])).all():
            raise NotFinite(
                f"step {run.step}: loss {result.loss}, gradient norm {result.grad_norm}; "
                "lower the learning rate, or go back to an earlier checkpoint"
            )
        elapsed = time.perf_counter() - started
        record = {
            "tokens": run.step * run.tokens_per_step,
            "loss": result.loss,
            "lr": rate,
            "grad_norm": result.grad_norm,
            **pop_balance_loss(run.num_microbatches),
            "tokens_per_second": run.tokens_per_step / elapsed,
            **throughput.of_step(run.device, run.tokens_per_step, elapsed, result.seconds),
        }
        if not torch.cuda.is_available():
            record["time_metrics/work(s)"] = elapsed - waited.seconds
        run.stopped = stop.agreed() and run.step < run.total_steps
        if run.step == run.thaws_at:
            run.thaw(run)  # before it is saved: who goes on from here has the same optimizer
        for callback in callbacks:
            callback.after_step(run, record)
    for callback in callbacks:
        callback.at_end(run)
    dist.barrier()


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM from a launcher or a person, SIGUSR1 from Slurm ahead of a time limit."""


class StopRequest:
    """Whether any rank has been asked to stop."""

    def __init__(self) -> None:
        self._asked = False

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """The same answer on every rank: True once any of them was asked. A collective."""
        if dist.get_world_size() == 1:
            return self._asked
        flag = torch.tensor([float(self._asked)], device=torch.cuda.current_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Within this block a stop signal sets the request instead of ending the process."""
    request = StopRequest()
    before = {number: signal.signal(number, request._note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
