"""Trains a stage's model for some steps on one rank and prints what it took, as JSON.

A program of its own, so that the peak resident set is its own. Arguments: a recipe, the stage, a
directory to save a checkpoint into.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path


def main() -> None:
    import os

    import torch

    from megatron_btx.engine import distributed
    from megatron_btx.recipe import check, count
    from megatron_btx.recipe.load import load_recipe
    from megatron_btx.recipe.schema import Layout

    recipe, stage = load_recipe(sys.argv[1]), sys.argv[2]
    training = replace(check.stages(recipe)[stage], layout=Layout())
    architecture = count.dense_architecture(recipe)
    if stage == "finetune":
        architecture = architecture.mixed(recipe)
    with tempfile.TemporaryDirectory() as meeting:
        os.environ["BTX_INIT_METHOD"] = f"file://{meeting}/rendezvous"
        distributed.initialize(training.layout, 0)
    from megatron_btx.engine import checkpoint
    from megatron_btx.engine.model import build_model, wrap_ddp
    from megatron_btx.engine.optimizer import build_optimizer, build_schedule

    model = build_model(architecture, training.layout, training.precision)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
    ddp = wrap_ddp(model, use_distributed_optimizer=False)
    optimizer = build_optimizer(ddp, training)
    shape = (training.micro_batch_size, recipe.model.seq_length)
    positions = torch.arange(shape[1]).expand(shape)
    for _ in range(6):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        for _ in range(2):
            tokens = torch.randint(0, architecture.vocab_size, shape)
            ddp(tokens, positions, None, labels=tokens.roll(-1, 1)).float().mean().backward()
        ddp.finish_grad_sync()
        optimizer.step()
    # Not ru_maxrss: across fork and exec it keeps the size of the process that started this one.
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    state = checkpoint.TrainingState(
        model=ddp, optimizer=optimizer, schedule=build_schedule(optimizer, training, 10)
    )
    directory = Path(sys.argv[3]) / "step_00000006"
    checkpoint.save(directory, state, checkpoint.manifest_of(architecture))
    disk = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    sys.stdout.write(json.dumps({"parameters": parameters, "peak": peak, "disk": disk}) + "\n")
    distributed.shutdown()


if __name__ == "__main__":  # saving starts processes that import this file
    main()
