"""What is frozen stays as it is and has no optimizer state; what thaws in the middle of a stage
begins without moments, while all else goes on as if nothing had happened.

The oracle is the same model under the same layout with Megatron's plain optimizer and nothing
frozen, in which, after each step of the frozen phase, the frozen weights are put back and their
moments made zero. Gradients are not clipped in this comparison (what is frozen has no part in the
norm, but has in the oracle's); AdamW then treats every weight by itself, and the two agree to the
bit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_btx.recipe import freezing
from megatron_btx.recipe.schema import Layout, MegatronOptions, Training
from tests.engine.harness import DENSE, MOE, Case, assemble, microbatches, pieces
from tests.ranks import RankError, Ranks

TP2 = Layout(tensor_model_parallel_size=2)
PP2 = Layout(pipeline_model_parallel_size=2)
DP2 = Layout(data_parallel_size=2)
EP2 = Layout(data_parallel_size=2, expert_model_parallel_size=2)
TIED = replace(DENSE, model=replace(DENSE.model, untie_embeddings_and_output_weights=False))
OVERLAP = MegatronOptions(
    ddp={"overlap_grad_reduce": True, "overlap_param_gather": True},
    optimizer={"overlap_param_gather": True},
)
RECOMPUTE = MegatronOptions(
    transformer={
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
)
ROUTER_ONLY = ("embeddings", "attention", "norms", "experts", "head")
STEPS, THAWS = 5, 3

CASES = {
    "router-only": (Case(MOE), ROUTER_ONLY),
    "some-experts-ep2-distopt": (
        Case(MOE, EP2, use_distributed_optimizer=True),
        ("experts.a", "experts.b", "experts.c", "embeddings", "*.experts.3.linear_fc2.weight"),
    ),
    "anchored-ep2": (Case(replace(MOE, experts=("own", "seed")), EP2), ("experts.seed", "norms")),
    "some-experts-tp2": (Case(MOE, TP2), ("experts.b", "attention", "decoder.layers.0.*")),
    "whole-stage-pp2": (Case(MOE, PP2, megatron=RECOMPUTE), ("decoder.layers.[01].*", "embed*")),
    "bf16-dense-dp2-distopt": (
        Case(DENSE, DP2, "bf16", use_distributed_optimizer=True, megatron=OVERLAP),
        ("ffn", "embeddings", "norms"),
    ),
    "some-experts-pp2-vp2-distopt": (
        Case(
            MOE,
            replace(PP2, virtual_pipeline_model_parallel_size=2),
            use_distributed_optimizer=True,
        ),
        ("experts.b", "attention", "decoder.layers.2.*"),
    ),
    "tied-pp2-distopt": (Case(TIED, PP2, use_distributed_optimizer=True), ("embeddings",)),
}


def training_of(case: Case, words: tuple[str, ...], **more: Any) -> Training:
    step = case.global_batch_size * case.architecture.model.seq_length
    return Training(
        tokens=STEPS * step,
        lr=1e-3,
        lr_warmup_iters=2,
        clip_grad=0.0,
        precision=case.precision,  # type: ignore[arg-type]
        use_distributed_optimizer=case.use_distributed_optimizer,
        layout=case.layout,
        megatron=case.megatron,
        global_batch_size=case.global_batch_size,
        freeze=words,
        freeze_until=THAWS * step - 1,
        **more,
    )


def _run(case: Case, training: Training, step: int) -> Any:
    from megatron_btx.engine import distributed
    from megatron_btx.engine.model import build_model
    from megatron_btx.train.freezing import FreezingSchedule
    from megatron_btx.train.loop import Run
    from tests.engine.harness import set_weights

    distributed.initialize(case.layout, case.random_seed)
    phases = FreezingSchedule(case.architecture, training, case.architecture.model)
    model = build_model(
        case.architecture, case.layout, training.precision, options=training.megatron
    )
    set_weights(model)
    wrapped, optimizer, schedule = phases.begin(model, step)
    return Run(
        model=wrapped,
        optimizer=optimizer,
        schedule=schedule,
        batches=lambda step: microbatches(case, step),
        total_steps=STEPS,
        num_microbatches=len(list(microbatches(case, step))),
        micro_batch_size=case.micro_batch_size,
        global_batch_size=case.global_batch_size,
        seq_length=case.architecture.model.seq_length,
        step=step,
        thaws_at=freezing.thaws_at(training, case.architecture.model),
        thaw=phases.thaw,
    )


class Watch:
    """After each step: this rank's weights, and how many numbers its optimizer keeps."""

    def __init__(self, folder: Path | None, case: Case, saves: int = 0) -> None:
        self.folder, self.case, self.saves = folder, case, saves
        self.weights: list[Any] = []
        self.kept: list[int] = []

    def at_start(self, run: Any) -> None: ...

    def at_end(self, run: Any) -> None: ...

    def after_step(self, run: Any, record: Any) -> None:
        from megatron_btx.engine import checkpoint, checkpoint_directory
        from megatron_btx.engine.model import gather_parameters

        states = [state for one in run.optimizer.chained_optimizers
                  for state in one.optimizer.state.values()]  # fmt: skip
        self.kept.append(sum(state["exp_avg"].numel() for state in states if state))
        gather_parameters(run.model)
        self.weights.append(pieces(run.model, lambda param: param))
        if run.step != self.saves:
            return
        assert self.folder is not None
        state = checkpoint.TrainingState(
            model=run.model, optimizer=run.optimizer, schedule=run.schedule
        )
        manifest = checkpoint.manifest_of(
            self.case.architecture,
            precision=self.case.precision,
            step=run.step,
            layout={"world_size": self.case.layout.world_size},
        )
        checkpoint.save(checkpoint_directory.step_directory(self.folder, run.step), state, manifest)


def train_frozen(case: Case, training: Training, folder: Path | None, step: int) -> Any:
    """From the beginning, saving step ``-step``; or on from what was saved of ``step``.

    Returns:
        Weights after each step and at the start, numbers kept by the optimizer, and the names of
        what learns at last.
    """
    from megatron_btx.engine import checkpoint, checkpoint_directory
    from megatron_btx.train.loop import StopRequest, train

    run = _run(case, training, max(step, 0))
    if step > 0:
        assert folder is not None
        state = checkpoint.TrainingState(
            model=run.model, optimizer=run.optimizer, schedule=run.schedule
        )
        checkpoint.load(checkpoint_directory.step_directory(folder, step), state)
    start = pieces(run.model, lambda param: param)
    watch = Watch(folder, case, -step)
    train(run, [watch], StopRequest())  # type: ignore[list-item]
    return start, watch.weights, watch.kept


def train_put_back(case: Case, training: Training) -> Any:
    """The oracle: weights after each step."""
    from megatron_btx.engine.model import canonical_parameters
    from megatron_btx.train.loop import StopRequest, train

    still = freezing.frozen(case.architecture, training.freeze)
    free = replace(training, freeze=(), freeze_until=None, use_distributed_optimizer=False)
    run = _run(replace(case, use_distributed_optimizer=False), free, 0)
    parameters = {held[0]: (held, parameter) for held, parameter in canonical_parameters(run.model)}
    names = {first: held for first, (held, _) in parameters.items()}
    held = {
        name: (parameter, [slice(None)] if len(names[name]) == 1 else range(len(names[name])))
        for name, (_, parameter) in parameters.items()
    }
    before = {name: parameter.detach().clone() for name, (parameter, _) in held.items()}
    owner = {id(p): one.optimizer for one in run.optimizer.chained_optimizers
             for group in one.optimizer.param_groups for p in group["params"]}  # fmt: skip

    class PutBack(Watch):
        def after_step(self, run: Any, record: Any) -> None:
            for name, (parameter, places) in held.items() if run.step <= THAWS else ():
                main = getattr(parameter, "main_param", parameter)
                state = owner[id(main)].state[main]
                for place, part in zip(places, names[name], strict=True):
                    if part in still:
                        for one in {id(parameter): parameter, id(main): main}.values():
                            one.data[place] = before[name][place].to(one.dtype)
                        state["exp_avg"][place] = 0
                        state["exp_avg_sq"][place] = 0
            super().after_step(run, record)

    watch = PutBack(None, case)
    train(run, [watch], StopRequest())  # type: ignore[list-item]
    return watch.weights


def _global(ranks: list[Any]) -> dict[str, np.ndarray]:
    return assemble(ranks)


def _same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_frozen_then_thawed(name: str, ranks: Ranks, tmp_path: Path) -> None:
    """And the same where the run was killed after it had saved before the boundary, or at it."""
    case, words = CASES[name]
    saved = THAWS - list(CASES).index(name) % 2
    world = case.layout.world_size
    # The oracle has no distributed optimizer, and so none of its options.
    plain = replace(case, megatron=MegatronOptions()) if case.megatron is OVERLAP else case
    wanted = ranks.run(train_put_back, world, plain, training_of(plain, words))
    found = ranks.run(train_frozen, world, case, training_of(case, words), tmp_path, -saved)
    for step in range(STEPS):
        trained = _global([rank[1][step] for rank in found])
        _same(trained, _global([rank[step] for rank in wanted]))
    start = _global([rank[0] for rank in found])
    moved = _global([rank[1][THAWS - 1] for rank in found])
    assert any(not np.array_equal(start[key], moved[key]) for key in start)
    frozen, whole = (sum(rank[2][at] for rank in found) for at in (0, STEPS - 1))
    assert frozen < whole
    again = ranks.run(train_frozen, world, case, training_of(case, words), tmp_path, saved)
    _same(_global([rank[1][-1] for rank in again]), trained)


def rates_of(case: Case, training: Training) -> dict[str, tuple[float, float]]:
    """Peak and last learning rate by canonical name, as Megatron's schedule reads them."""
    from megatron_btx.engine.freezing import canonical_names
    from megatron_btx.engine.model import unwrap

    run = _run(case, training, 0)
    names = canonical_names(unwrap(run.model))
    whose = {id(p): names[name][0] for name, p in unwrap(run.model).named_parameters()}
    return {
        whose[id(parameter)]: (group["max_lr"], group["min_lr"])
        for one in run.optimizer.chained_optimizers
        for group in one.optimizer.param_groups
        for parameter in group["params"]
    }


def test_rates_of_their_own(ranks: Ranks) -> None:
    """In proportion to the schedule's; all else has the stage's."""
    case = Case(MOE)
    training = replace(training_of(case, ()), freeze_until=None, min_lr=1e-4)
    training = replace(training, lr_groups={"router": 4e-3, "decoder.layers.0.*": 2e-3})
    (found,) = ranks.run(rates_of, 1, case, training)
    assert found["decoder.layers.0.mlp.router.weight"] == pytest.approx((2e-3, 2e-4))
    assert found["decoder.layers.1.mlp.router.weight"] == pytest.approx((4e-3, 4e-4))
    assert found["output_layer.weight"] == pytest.approx((1e-3, 1e-4))
    each = replace(training, lr_groups={"experts.a": 1e-4})
    with pytest.raises(RankError, match="gives experts on one rank different learning rates"):
        ranks.run(rates_of, 1, case, each)
