"""``average_last``: a stage's model is the mean of its last checkpoints, as a plain loop has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_btx.recipe import count
from megatron_btx.recipe.schema import Layout, Training
from tests.engine.harness import DENSE, MOE, Case, assemble, microbatches, pieces
from tests.ranks import Ranks

EP2 = Layout(data_parallel_size=2, expert_model_parallel_size=2)
CASES = {"bf16": Case(DENSE, precision="bf16"), "ep2-distopt": Case(
    MOE, EP2, use_distributed_optimizer=True
)}  # fmt: skip


def run_stage(case: Case, training: Training, folder: Path, first: int, stop: int) -> Any:
    """From step ``first``'s checkpoint (0: the beginning) to step ``stop``.

    Returns:
        Weights after each step, and at the end.
    """
    from megatron_btx.engine import checkpoint, checkpoint_directory, distributed
    from megatron_btx.engine.model import build_model
    from megatron_btx.train.callbacks import AverageLast, Checkpoints
    from megatron_btx.train.freezing import FreezingSchedule
    from megatron_btx.train.loop import Callback, Run, StopRequest, train
    from tests.engine.harness import set_weights

    class Watch(Callback):
        """After each step, before anything is averaged."""

        weights: list[Any] = []

        def after_step(self, run: Run, record: dict[str, Any]) -> None:
            self.weights = [*self.weights, pieces(run.model, lambda param: param)]
            run.stopped = run.step == stop < run.total_steps

    def manifest(run: Run) -> dict[str, Any]:
        world = {"world_size": case.layout.world_size}
        return checkpoint.manifest_of(
            case.architecture, precision=case.precision, step=run.step, layout=world
        )

    distributed.initialize(case.layout, case.random_seed)
    model = build_model(case.architecture, case.layout, training.precision)
    set_weights(model)
    learning = FreezingSchedule(case.architecture, training, case.architecture.model)
    wrapped, optimizer, schedule = learning.begin(model, first)
    if first:
        state = checkpoint.TrainingState(model=wrapped, optimizer=optimizer, schedule=schedule)
        checkpoint.load(checkpoint_directory.step_directory(folder, first), state)
    steps = count.averaged_steps(training, case.architecture.model)
    run = Run(
        model=wrapped,
        optimizer=optimizer,
        schedule=schedule,
        batches=lambda step: microbatches(case, step),
        total_steps=steps[-1],
        num_microbatches=len(list(microbatches(case, first))),
        micro_batch_size=case.micro_batch_size,
        global_batch_size=case.global_batch_size,
        seq_length=case.architecture.model.seq_length,
        step=first,
    )
    watch = Watch()
    saving = Checkpoints(folder, training, manifest, lambda _: None, None, steps)
    average = AverageLast(folder, steps, training.precision, manifest, saving)
    train(run, [watch, average, saving], StopRequest())
    return watch.weights, pieces(run.model, lambda param: param)


@pytest.mark.parametrize("name", CASES)
def test_the_mean_of_the_last(name: str, ranks: Ranks, tmp_path: Path) -> None:
    """Of steps 4, 6 and 7; a checkpoint that was saved between them as a run was stopped is none
    of them, and what keeps the latter two whole is not how many are kept for going on."""
    import torch

    case = CASES[name]
    training = Training(
        tokens=7 * case.global_batch_size * case.architecture.model.seq_length,
        lr=1e-3,
        lr_warmup_iters=1,
        lr_decay_style="constant",
        precision=case.precision,  # type: ignore[arg-type]
        use_distributed_optimizer=case.use_distributed_optimizer,
        layout=case.layout,
        global_batch_size=case.global_batch_size,
        save_interval=2,
        keep_checkpoints=1,
        average_last=3,
    )
    world = case.layout.world_size
    before = ranks.run(run_stage, world, case, training, tmp_path, 0, 5)
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000004", "step_00000005"}
    after = ranks.run(run_stage, world, case, training, tmp_path, 5, 7)
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000007"}
    trained = [
        assemble([rank[0][at] for rank in half])
        for half, at in ((before, 3), (after, 0), (after, 1))
    ]
    found = assemble([rank[1] for rank in after])
    for key, tensor in found.items():
        total = np.zeros(tensor.shape, np.float64)
        for model in trained:
            total += model[key].astype(np.float64)
        mean = torch.from_numpy(total / 3).to(torch.bfloat16 if name == "bf16" else torch.float32)
        wanted = mean.float().numpy()
        if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            wanted[case.architecture.vocab_size :] = 0  # padding, of which nothing is averaged
        np.testing.assert_array_equal(tensor, wanted, err_msg=key)
        assert not np.array_equal(tensor, trained[-1][key])
