"""Checkpoints: whole under one layout, loaded under another bit for bit, resumed bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_btx.recipe.schema import Layout
from tests.engine.harness import DENSE, MOE, Case, Pieces, assemble, microbatches, pieces
from tests.ranks import Ranks

DP2 = Layout(data_parallel_size=2)
TP2 = Layout(tensor_model_parallel_size=2)
PP2 = Layout(pipeline_model_parallel_size=2)
EP2 = Layout(data_parallel_size=2, expert_model_parallel_size=2)
TP2_EP2 = Layout(
    tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1
)


def session(
    case: Case, folder: Path, load: int | None, steps: int, save: bool
) -> tuple[Pieces, list[float]]:
    """Train under a case, from step ``load``'s checkpoint where there is one.

    Returns:
        This rank's weights as loaded (or as trained, from nothing), and the losses.
    """
    from megatron_btx.engine import checkpoint, distributed
    from megatron_btx.engine.model import build_model, wrap_ddp
    from megatron_btx.engine.optimizer import build_optimizer, build_schedule
    from megatron_btx.recipe.schema import Training
    from megatron_btx.train.step import train_step
    from tests.engine.harness import set_weights

    distributed.initialize(case.layout, case.random_seed)
    training = Training(
        lr=1e-3,
        lr_warmup_iters=2,
        precision=case.precision,  # type: ignore[arg-type]
        use_distributed_optimizer=case.use_distributed_optimizer,
        layout=case.layout,
    )
    model = build_model(case.architecture, case.layout, training.precision)
    if load is None:
        set_weights(model)
    ddp = wrap_ddp(model, use_distributed_optimizer=case.use_distributed_optimizer)
    optimizer = build_optimizer(ddp, training)
    schedule = build_schedule(optimizer, training, 6)
    state = checkpoint.TrainingState(model=ddp, optimizer=optimizer, schedule=schedule)
    if load is not None:
        checkpoint.load(checkpoint.step_directory(folder, load), state)
    weights = pieces(ddp, lambda param: param)
    first, losses = load or 0, []
    for step in range(first, first + steps):
        micro = list(microbatches(case, step))
        result = train_step(
            ddp,
            optimizer,
            schedule,
            iter(micro),
            step=step,
            num_microbatches=len(micro),
            micro_batch_size=case.micro_batch_size,
            seq_length=case.architecture.model.seq_length,
        )
        losses.append(result.loss)
    if load is None:
        weights = pieces(ddp, lambda param: param)
    if save:
        manifest = checkpoint.manifest_of(
            case.architecture,
            precision=case.precision,
            step=first + steps,
            layout={"world_size": case.layout.world_size},
        )
        checkpoint.save(checkpoint.step_directory(folder, first + steps), state, manifest)
    return weights, losses


def load_weights(case: Case, folder: Path) -> tuple[Pieces]:
    """The model of step 2, without an optimizer."""
    from megatron_btx.engine import checkpoint, distributed
    from megatron_btx.engine.model import build_model

    distributed.initialize(case.layout, case.random_seed)
    model = build_model(case.architecture, case.layout, case.precision)  # type: ignore[arg-type]
    checkpoint.load(checkpoint.step_directory(folder, 2), checkpoint.TrainingState(model=model))
    return (pieces(model, lambda param: param),)


def same_weights(saved: list[Any], loaded: list[Any]) -> None:
    before, after = (assemble([rank[0] for rank in side]) for side in (saved, loaded))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert np.array_equal(tensor, after[name]), name


CASES = {  # written under, read under
    "dense tp2 -> pp2": (Case(DENSE, TP2), [PP2]),
    "moe ep2 -> tp2 ep2": (Case(MOE, EP2), [TP2_EP2]),
    "moe ep2 distributed -> tp2 ep2": (Case(MOE, EP2, use_distributed_optimizer=True), [TP2_EP2]),
    "bf16 dense dp2 distributed -> tp2": (
        Case(DENSE, DP2, "bf16", use_distributed_optimizer=True),
        [TP2],
    ),
}
# The losses that follow, under another order of sums: as the layouts' own test.
LOSS = {"fp32": 1e-5, "bf16": 3e-2}


@pytest.mark.parametrize("name", CASES)
def test_saved_under_one_layout_loaded_under_another(
    name: str, ranks: Ranks, tmp_path: Path
) -> None:
    case, layouts = CASES[name]
    world = case.layout.world_size
    saved = ranks.run(session, world, case, tmp_path, None, 2, True)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_00000002"], "a checkpoint bears its name only when whole"
    unstopped = ranks.run(session, world, case, tmp_path / "unused", None, 4, False)[0][1]

    resumed = ranks.run(session, world, case, tmp_path, 2, 2, False)
    same_weights(saved, resumed)
    assert saved[0][1] + resumed[0][1] == unstopped, "a resumed run is the unstopped run"
    # Weights alone go anywhere; the optimizer's state only where as many ranks share the experts:
    # Megatron keeps experts' states apart where there are several, and not where there is one.
    alone = replace(case, layout=Layout())
    same_weights(saved, ranks.run(load_weights, 1, alone, tmp_path))
    for layout in layouts:
        other = replace(case, layout=layout)
        moved = ranks.run(session, layout.world_size, other, tmp_path, 2, 2, False)
        same_weights(saved, moved)
        np.testing.assert_allclose(
            moved[0][1], unstopped[2:], atol=LOSS[case.precision], rtol=0, err_msg=str(layout)
        )


def save_on_a_full_disk(folder: Path) -> tuple[str, list[str]]:
    """What a save says whose files may not grow beyond 20 kB, and what it leaves."""
    import resource

    from megatron_btx.engine import checkpoint, distributed
    from megatron_btx.engine.model import build_model
    from megatron_btx.errors import UserError
    from tests.engine.harness import set_weights

    distributed.initialize(Layout(), 1)
    model = build_model(DENSE, Layout(), "fp32")
    set_weights(model)
    state = checkpoint.TrainingState(model=model)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        checkpoint.save(checkpoint.step_directory(folder, 1), state, checkpoint.manifest_of(DENSE))
    except UserError as error:
        return str(error), [path.name for path in folder.iterdir()]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    raise AssertionError("it was written")


def test_a_save_that_finds_no_space_says_so_and_leaves_nothing(
    ranks: Ranks, tmp_path: Path
) -> None:
    said, left = ranks.run(save_on_a_full_disk, 1, tmp_path)[0]
    assert "step_00000001: cannot be written: File too large" in said
    assert "fix: free some space" in said
    assert left == []


def load_what_is_cut(folder: Path) -> str:
    """What loading step 2 says."""
    from megatron_btx.errors import UserError

    try:
        session(Case(DENSE), folder, 2, 1, False)
    except UserError as error:
        return str(error)
    raise AssertionError("it was loaded")


def test_a_truncated_checkpoint_is_told(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(session, 1, Case(DENSE), tmp_path, None, 2, True)
    (payload,) = tmp_path.glob("step_00000002/*.distcp")
    payload.write_bytes(payload.read_bytes()[: payload.stat().st_size // 2])
    said = ranks.run(load_what_is_cut, 1, tmp_path)[0]
    assert "step_00000002: cannot be loaded" in said
    assert "fix:" in said
