"""A training stage on random tokens, for the ranks of the pool: the loop and its callbacks without
recipe and data."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import torch

from megatron_btx.recipe.schema import Training
from tests.engine.harness import Case, Pieces, microbatches, pieces, set_weights


def run(
    case: Case,
    directory: str,
    total_steps: int,
    *,
    stop_at: int | None = None,
    break_replica_at: int | None = None,
    async_save: bool = False,
) -> tuple[list[dict[str, Any]], Pieces]:
    """Train (or go on) in ``directory``; the metrics and this rank's weights.

    ``stop_at``: rank 0 sends itself SIGTERM during that step.
    """
    from megatron_btx.engine import distributed
    from megatron_btx.engine.checkpoint import TrainingState, load, manifest_of
    from megatron_btx.engine.model import build_model, wrap_ddp
    from megatron_btx.engine.optimizer import build_optimizer, build_schedule
    from megatron_btx.files import newest_step
    from megatron_btx.recipe.schema import Recipe, WandB
    from megatron_btx.train.callbacks import Checkpoints, CheckReplicas, Log
    from megatron_btx.train.loop import Run, listening, train
    from megatron_btx.train.metrics import read
    from megatron_btx.train.tracking import Tracker
    from megatron_btx.weights.manifest import read_manifest

    where = Path(directory)
    distributed.initialize(case.layout, case.random_seed)
    training = Training(
        lr=1e-3,
        lr_warmup_iters=2,
        precision=case.precision,  # type: ignore[arg-type]
        use_distributed_optimizer=case.use_distributed_optimizer,
        save_interval=2,
        async_save=async_save,
        check_replicas_interval=1,
        layout=case.layout,
    )
    model = build_model(
        case.architecture,
        case.layout,
        training.precision,
        random_seed=case.random_seed,
        options=case.megatron,
    )
    set_weights(model)
    ddp = wrap_ddp(model, use_distributed_optimizer=case.use_distributed_optimizer)
    optimizer = build_optimizer(ddp, training)
    schedule = build_schedule(optimizer, training, total_steps)
    step, resumed = 0, newest_step(where / "checkpoints")
    if resumed is not None:
        manifest = read_manifest(resumed)[1]
        step = manifest["step"]
        state = TrainingState(model=ddp)
        if manifest["has_optimizer"]:
            state = TrainingState(model=ddp, optimizer=optimizer, schedule=schedule)
        load(resumed, state)

    def batches(number: int) -> Any:
        if number + 1 == stop_at and distributed.is_first_rank():
            os.kill(os.getpid(), signal.SIGTERM)
        if number + 1 == break_replica_at and distributed.is_first_rank():
            with torch.no_grad():
                next(p for p in model.parameters() if p.dim() == 1).add_(1e-3)
        return microbatches(case, number)

    progress = Run(
        model=ddp,
        optimizer=optimizer,
        schedule=schedule,
        batches=batches,
        total_steps=total_steps,
        num_microbatches=len(list(microbatches(case, 0))),
        micro_batch_size=case.micro_batch_size,
        global_batch_size=case.global_batch_size,
        seq_length=case.architecture.model.seq_length,
        step=step,
    )
    off = Recipe.__new__(Recipe)
    object.__setattr__(off, "wandb", WandB(mode="disabled"))
    log = None
    if distributed.is_first_rank():
        log = Log(where / "metrics.jsonl", Tracker(off, "x", where, {}), step)
    saved = functools.partial(
        manifest_of,
        case.architecture,
        layout={"world_size": case.layout.world_size},
        lineage={},
    )
    callbacks = [
        *([] if log is None else [log]),
        CheckReplicas(training),
        Checkpoints(
            where / "checkpoints", training, lambda r: saved(step=r.step), lambda _: None, log
        ),
    ]
    with listening() as stop:
        train(progress, callbacks, stop)
    return read(where / "metrics.jsonl"), pieces(ddp, lambda parameter: parameter)


def seen_by_ranks(directory: str) -> str | None:
    """What a rank would go on from; the second one's view of the directory lacks the last step."""
    from megatron_btx.engine import distributed
    from megatron_btx.recipe.schema import Layout
    from megatron_btx.train import train_stage

    distributed.initialize(Layout(data_parallel_size=2), 0)
    newest = train_stage.newest_step
    if os.environ["RANK"] == "1":
        train_stage.newest_step = lambda path: sorted(path.glob("step_*"))[0]
    try:
        found = train_stage.last_checkpoint(Path(directory))
    finally:
        train_stage.newest_step = newest
    return None if found is None else found[0].name
