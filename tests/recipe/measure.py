"""One rank that trains a stage's model for some steps and prints what it took, as JSON.

A program of its own, so that the peak resident set is its own; as many are started as the stage's
layout has ranks, with torch's RANK and WORLD_SIZE. Arguments: a recipe, the stage, a directory to
save a checkpoint into.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

STEPS = 2
"""The first, of one sequence, gives the optimizer its state; the second has the peak. Processors
without instructions for bf16 multiply far slower."""


def peak() -> int:
    """Bytes. Not ru_maxrss: across fork and exec it keeps the size of what started this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    import torch

    from megatron_btx.engine import distributed
    from megatron_btx.recipe import check, count
    from megatron_btx.recipe.load import load_recipe

    recipe, stage = load_recipe(sys.argv[1]), sys.argv[2]
    training = check.stages(recipe)[stage]
    architecture = count.dense_architecture(recipe)
    if stage == "finetune":
        architecture = architecture.mixed(recipe)
    distributed.initialize(training.layout, 0)
    from megatron_btx.engine import checkpoint
    from megatron_btx.engine.model import build_model, wrap_ddp
    from megatron_btx.engine.optimizer import build_optimizer, build_schedule
    from megatron_btx.train.step import train_step

    runtime = peak()
    model = build_model(
        architecture, training.layout, training.precision, options=training.megatron
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
    ddp = wrap_ddp(model, use_distributed_optimizer=training.use_distributed_optimizer)
    optimizer = build_optimizer(ddp, training)
    started = peak()
    seq = recipe.model.seq_length
    for step in range(STEPS):
        rows = training.micro_batch_size if step else 1
        tokens = torch.randint(0, architecture.vocab_size, (rows, seq))
        batch = {
            "tokens": tokens,
            "labels": tokens.roll(-1, 1),
            "loss_mask": torch.ones(rows, seq),
            "position_ids": torch.arange(seq).expand(rows, seq),
            "samples": torch.arange(rows),
        }
        train_step(
            ddp,
            optimizer,
            None,
            iter([batch]),
            step=step,
            num_microbatches=1,
            micro_batch_size=rows,
            seq_length=seq,
        )
    trained = peak()
    state = checkpoint.TrainingState(
        model=ddp, optimizer=optimizer, schedule=build_schedule(optimizer, training, 10)
    )
    directory = Path(sys.argv[3]) / "step_00000002"
    checkpoint.save(directory, state, checkpoint.manifest_of(architecture))
    disk = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    found = {"parameters": parameters, "runtime": runtime, "started": started, "peak": trained}
    sys.stdout.write(json.dumps(found | {"saved": peak(), "disk": disk}) + "\n")
    distributed.shutdown()


if __name__ == "__main__":  # saving starts processes that import this file
    main()
