"""Scenarios in which a rank hangs or is slow."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from tests.slurm.cluster import wait
from tests.slurm.conftest import branch, longer_finetune

if TYPE_CHECKING:
    from tests.slurm.test_disturbed import Around


def a_rank_hangs(around: Around) -> None:
    """One of two is stopped: both say where they are, and the job is requeued."""
    run = longer_finetune(around.whole, around.place("hangs"), "hang_minutes: 1\n")
    job = run.submit("--only", "finetune")["finetune"]
    run.training("finetune", job)
    os.kill(run.ranks("finetune")[-1], signal.SIGSTOP)
    wait(lambda: "requeued: a rank hangs: rank " in run.out(), 300, "the requeue")
    run.finished()
    row = run.status()["finetune"]
    assert (row["state"], row["restarts"] > 0) == ("done", True), run.out()
    first = (run.run_dir / "finetune" / "log" / "attempt-1.log").read_text()
    for rank in (0, 1):
        assert f"{rank}: rank {rank}: nothing done for 1." in first
    assert run.steps("finetune") == around.futures["a_finetuning"].result()


def a_rank_hangs_as_it_evaluates(around: Around) -> None:
    """One of four is stopped, which gives no sign; the others' stacks are in the log."""
    text = (
        "hang_minutes: 1\nevaluate: {tokens: 32_768, micro_batch_size: 1, "
        "layout: {data_parallel_size: 4}}\n"
    )
    whole = around.whole
    stages = ["prepare", "seed", "finetune", "dense"]
    stages += [f"expert-{domain}" for domain in ("code", "math", "prose")]
    run = branch(whole, around.place("hangs evaluating"), text, *stages)
    run.submit("--only", "evaluate")
    progress = run.run_dir / "evaluate" / "progress.json"
    wait(progress.exists, 300, "the evaluation to begin")
    os.kill(run.ranks("evaluate")[-1], signal.SIGSTOP)
    wait(lambda: "requeued: a rank hangs: rank " in run.out(), 300, "the requeue")
    run.finished()
    row = run.status()["evaluate"]
    assert (row["state"], row["restarts"] > 0) == ("done", True), run.out()
    first = (run.run_dir / "evaluate" / "log" / "attempt-1.log").read_text()
    assert "nothing done for 1." in first
    assert 'File "' in first  # a stack
    assert (run.run_dir / "results.json").exists()


def a_slow_rank(around: Around) -> None:
    """One of two is stopped again and again for a moment, and named."""
    run = longer_finetune(around.whole, around.place("slow"))
    job = run.submit("--only", "finetune")["finetune"]
    run.training("finetune", job, after=5)
    slow, notes = run.ranks("finetune")[-1], set()
    rank = os.fsdecode(_environment(slow)[b"SLURM_PROCID"])
    deadline = time.monotonic() + 60
    while f"rank {rank} on n" not in "".join(notes) and time.monotonic() < deadline:
        for _ in range(10):
            os.kill(slow, signal.SIGSTOP)
            time.sleep(0.2)
            os.kill(slow, signal.SIGCONT)
            time.sleep(0.02)
        notes.add(run.status()["finetune"]["note"])
    assert f"rank {rank} on n" in "".join(notes), notes
    run.finished()
    log = (run.run_dir / "finetune" / "log" / "attempt-1.log").read_text()
    assert f"rank {rank} on n" in log
    assert run.steps("finetune") == around.futures["a_finetuning"].result()


def _environment(process: int) -> dict[bytes, bytes]:
    with open(f"/proc/{process}/environ", "rb") as file:
        pairs = (entry.partition(b"=") for entry in file.read().split(b"\0"))
        return {name: value for name, _, value in pairs}
