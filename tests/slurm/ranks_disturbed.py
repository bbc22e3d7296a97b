"""Scenarios in which a rank hangs or is slow."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_btx.files import find_json
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.systems import rows
from tests.slurm.cluster import wait
from tests.slurm.conftest import Run, branch, longer_finetune

if TYPE_CHECKING:
    from tests.slurm.test_disturbed import Around


def a_rank_hangs(around: Around) -> None:
    """One of two is stopped: both say where they are, and the job is requeued."""
    minutes = _patience(around.whole, "finetune")
    run = longer_finetune(around.whole, around.place("hangs"), f"hang_minutes: {minutes}\n")
    job = run.submit("--only", "finetune")["finetune"]
    run.training("finetune", job)
    os.kill(run.ranks("finetune")[-1], signal.SIGSTOP)
    wait(lambda: "requeued: a rank hangs: rank " in run.out(), "the requeue", 600 + 60 * minutes)
    run.finished()
    row = run.status()["finetune"]
    assert (row["state"], row["restarts"] > 0) == ("done", True), run.out()
    first = (run.run_dir / "finetune" / "log" / "attempt-1.log").read_text()
    for rank in (0, 1):
        assert f"{rank}: rank {rank}: nothing done for " in first
    assert run.steps("finetune") == around.futures["a_finetuning"].result()


def a_rank_hangs_as_it_evaluates(around: Around) -> None:
    """One of four is stopped in the middle of a model's text, and gives no sign; the others say in
    which function of the evaluation they wait for it."""
    whole = around.whole
    minutes = _patience(whole, "evaluate")
    text = (
        f"hang_minutes: {minutes}\nevaluate: {{tokens: 32_768, micro_batch_size: 1, "
        "layout: {data_parallel_size: 4}}\n"
    )
    stages = ["prepare", "seed", "finetune", "dense"]
    stages += [f"expert-{domain}" for domain in ("code", "math", "prose")]
    run = branch(whole, around.place("hangs evaluating"), text, *stages)
    run.submit("--only", "evaluate")
    progress = run.run_dir / "evaluate" / "progress.json"
    models = len(rows(load_recipe(run.recipe)))

    def in_the_text() -> bool:
        return (float((find_json(progress) or {}).get("done", 0)) * models) % 1 > 0

    wait(in_the_text, "the evaluation to begin")
    os.kill(run.ranks("evaluate")[-1], signal.SIGSTOP)
    wait(lambda: "requeued: a rank hangs: rank " in run.out(), "the requeue", 600 + 60 * minutes)
    run.finished()
    row = run.status()["evaluate"]
    assert (row["state"], row["restarts"] > 0) == ("done", True), run.out()
    first = (run.run_dir / "evaluate" / "log" / "attempt-1.log").read_text()
    assert "nothing done for " in first
    assert re.search(r'/evaluate/heldout_loss\.py", line \d+ in evaluate\n', first), first
    assert (run.run_dir / "results.json").exists()


def _patience(whole: Run, stage: str) -> int:
    """Minutes after which a rank hangs: one, or more where this machine was so busy that four ranks
    need as long to start as the whole stage of two took, or has become so since."""
    done = find_json(whole.run_dir / stage / "done.json")
    assert done is not None
    waiting_for_a_core = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    return max(1, math.ceil(max(2, waiting_for_a_core) * done["seconds"] / 60))


def a_slow_rank(around: Around) -> None:
    """One of two is stopped again and again for a moment, and named while it is."""
    run = longer_finetune(around.whole, around.place("slow"))
    job = run.submit("--only", "finetune")["finetune"]
    run.training("finetune", job, after=5)
    slow = run.ranks("finetune")[-1]
    named = f"rank {os.fsdecode(_environment(slow)[b'SLURM_PROCID'])} on n"
    with _slowed(slow):
        wait(lambda: named in run.status()["finetune"]["note"], "the rank to be named")
    run.finished()
    log = (run.run_dir / "finetune" / "log" / "attempt-1.log").read_text()
    assert named in log
    assert run.steps("finetune") == around.futures["a_finetuning"].result()


@contextlib.contextmanager
def _slowed(process: int) -> Iterator[None]:
    """It runs for a tenth of the time, until the end of the block or its own."""
    over = threading.Event()

    def pulse() -> None:
        with contextlib.suppress(ProcessLookupError):
            while not over.is_set():
                os.kill(process, signal.SIGSTOP)
                time.sleep(0.2)
                os.kill(process, signal.SIGCONT)
                time.sleep(0.02)

    thread = threading.Thread(target=pulse)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _environment(process: int) -> dict[bytes, bytes]:
    with open(f"/proc/{process}/environ", "rb") as file:
        pairs = (entry.partition(b"=") for entry in file.read().split(b"\0"))
        return {name: value for name, _, value in pairs}
