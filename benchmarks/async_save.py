"""How long training waits for a checkpoint: written before it goes on, and while it goes on.

    python benchmarks/async_save.py                     # about 250 MB, one rank; a minute
    python benchmarks/async_save.py --ranks 2 --hidden 640 --distributed-optimizer

Each of the rounds trains two steps and saves synchronously, then trains, begins an asynchronous
save, trains on until it is whole, and ends it. One JSON line: bytes, median seconds of the
synchronous save, of the stall (beginning, looks, end; also as CPU seconds, which other work on the
machine moves less), their ratio, and how long a step takes before and beside the writing. The files
lie in ``--folder`` and are removed. That both hold the same is held by
tests/engine/test_async_save.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def rank(options: argparse.Namespace) -> dict[str, Any]:
    """What one rank measures."""
    from megatron_btx.engine import cpu

    cpu.install()
    import torch

    from megatron_btx.engine import checkpoint, distributed
    from megatron_btx.engine.async_save import AsyncSave
    from megatron_btx.engine.initializer import initialize
    from megatron_btx.engine.model import build_model, wrap_ddp
    from megatron_btx.engine.optimizer import build_optimizer, build_schedule
    from megatron_btx.mix.one_model import fresh
    from megatron_btx.recipe.architecture import Architecture
    from megatron_btx.recipe.schema import Layout, Model, Training
    from megatron_btx.train.step import train_step

    layout = Layout(data_parallel_size=options.ranks)
    distributed.initialize(layout, 1)
    what = Architecture(
        model=Model(
            num_layers=options.layers,
            hidden_size=options.hidden,
            ffn_hidden_size=options.hidden * 11 // 4,
            num_attention_heads=8,
            seq_length=64,
        ),
        vocab_size=2048,
    )
    model = build_model(what, layout, "fp32")
    initialize(model, fresh(what, seed=1, dtype=torch.float32))
    training = Training(
        precision="fp32", use_distributed_optimizer=options.distributed_optimizer, layout=layout
    )
    ddp = wrap_ddp(model, use_distributed_optimizer=options.distributed_optimizer)
    optimizer = build_optimizer(ddp, training)
    schedule = build_schedule(optimizer, training, 1000)
    state = checkpoint.TrainingState(model=ddp, optimizer=optimizer, schedule=schedule)
    tokens = torch.randint(0, 2048, (1, 65), generator=torch.Generator().manual_seed(1))
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(1, 64),
        "position_ids": torch.arange(64)[None],
        "samples": torch.arange(1),
    }
    taken: dict[str, list[float]] = {
        name: [] for name in ("waits", "stall", "stall_cpu", "whole", "step_before", "step_beside")
    }

    def step(kind: str) -> None:
        started = time.perf_counter()
        train_step(
            ddp, optimizer, schedule, iter([batch]), step=0, num_microbatches=1,
            micro_batch_size=1, seq_length=64,
        )  # fmt: skip
        taken[kind].append(time.perf_counter() - started)

    def place(name: str) -> Path:
        return Path(options.folder) / name

    manifest = checkpoint.manifest_of(what, layout={"world_size": options.ranks})
    for number in range(options.rounds + 1):
        if number == 1:  # what is done once, is done
            for values in taken.values():
                values.clear()
        for _ in range(2):
            step("step_before")
        started = time.perf_counter()
        checkpoint.save(place(f"waits-{number}"), state, manifest)
        taken["waits"].append(time.perf_counter() - started)
        step("step_before")
        begun, cpu_begun = time.perf_counter(), time.thread_time()
        writing = AsyncSave(place(f"beside-{number}"), state, manifest)
        stall, done = time.perf_counter() - begun, False
        stall_cpu = time.thread_time() - cpu_begun
        while not done:
            step("step_beside")
            looked, cpu_looked = time.perf_counter(), time.thread_time()
            done = writing.finished()
            stall += time.perf_counter() - looked
            stall_cpu += time.thread_time() - cpu_looked
        taken["stall"].append(stall)
        taken["stall_cpu"].append(stall_cpu)
        taken["whole"].append(time.perf_counter() - begun)
    size = sum(path.stat().st_size for path in place("beside-0").iterdir() if path.is_file())
    distributed.shutdown()
    median = {name: statistics.median(values) for name, values in taken.items()}
    return {
        "ranks": options.ranks,
        "distributed_optimizer": options.distributed_optimizer,
        "MB": round(size / 1e6),
        "synchronous_save_s": round(median["waits"], 4),
        "stall_s": round(median["stall"], 4),
        "stall_cpu_s": round(median["stall_cpu"], 4),
        "stall_of_synchronous": round(median["stall"] / median["waits"], 4),
        "asynchronous_save_s": round(median["whole"], 4),
        "step_s": round(median["step_before"], 4),
        "step_beside_s": round(median["step_beside"], 4),
    }


def main() -> None:
    """Start the ranks; the first one's measurements as a JSON line."""
    parser = argparse.ArgumentParser(description="What training waits for a checkpoint.")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=640, help="640: about 20M parameters")
    parser.add_argument("--distributed-optimizer", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="for the checkpoints; removed again")
    options = parser.parse_args()
    if "RANK" in os.environ:
        line = rank(options)
        if os.environ["RANK"] == "0":
            print(json.dumps(line))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--folder", folder]
        shared = {
            "WORLD_SIZE": str(options.ranks),
            "BTX_INIT_METHOD": f"file://{folder}/rendezvous",
            "OMP_NUM_THREADS": "1",
        }
        ranks = [
            subprocess.Popen(
                command, env=os.environ | shared | {"RANK": str(n), "LOCAL_RANK": str(n)}
            )
            for n in range(options.ranks)
        ]
        codes = [process.wait() for process in ranks]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
