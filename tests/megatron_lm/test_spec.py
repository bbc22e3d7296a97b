"""Our layers in NVIDIA's trainer, by its ``--spec``: it trains as our own trainer does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_btx.recipe.schema import Layout, Routing, Training
from tests.megatron_lm import trainer
from tests.megatron_lm.made import (
    LAYOUTS,
    LENGTH,
    TOKENS,
    TOLERANCE,
    VOCABULARY,
    close,
    export,
    losses_of,
    words_for,
)
from tests.ranks import Ranks

pytestmark = pytest.mark.skipif(not trainer.HERE, reason=trainer.WHY)

MODULE = "megatron_btx.engine.megatron_lm_spec"
_GENERATOR = torch.Generator().manual_seed(2)
BATCHES = torch.randint(0, VOCABULARY, (5, 4, LENGTH + 1), generator=_GENERATOR)
"""Five steps of two micro-batches of two sequences."""

SAMPLE = ("--moe-router-topk", "1", "--moe-router-pre-softmax")
SWITCH = (*SAMPLE, "--moe-expert-capacity-factor", "1.5", "--moe-token-drop-policy", "position")
CASES: dict[str, tuple[Routing, str, tuple[str, ...]]] = {  # ours, layout, the trainer's words
    "topk": (Routing(), "one rank", ("--spec", MODULE, "topk")),
    "topk, TP2 x EP2": (
        Routing(),
        "TP2 x EP2",
        ("--spec", MODULE, "topk", "--sequence-parallel", "--expert-tensor-parallel-size", "1"),
    ),
    "sample_top1": (
        Routing(type="sample_top1", temperature_rate=0.1),
        "EP2",
        ("--spec", "tests.megatron_lm.test_spec", "sampled", *SAMPLE),
    ),
    "switch": (Routing(type="switch"), "EP2", ("--spec", MODULE, "switch", *SWITCH)),
    "soft": (
        Routing(type="soft"),
        "one rank",
        ("--spec", MODULE, "soft", "--moe-router-topk", "4"),
    ),
}


def sampled(config: Any, vp_stage: int | None = None) -> Any:
    """What a user writes for numbers of his own; its temperature falls within the test."""
    from megatron_btx import megatron_lm_spec

    return megatron_lm_spec(CASES["sample_top1"][0])(config, vp_stage)


def ours(step: Path, routing: Routing, layout: Layout, batches: Tensor) -> list[float]:
    """The losses of our own trainer's steps, from the same weights, on the same batches."""
    from megatron_btx.engine import distributed
    from megatron_btx.engine.initializer import initialize
    from megatron_btx.engine.model import build_model, wrap_ddp
    from megatron_btx.engine.optimizer import build_optimizer, build_schedule
    from megatron_btx.mix.one_model import copy
    from megatron_btx.train.step import train_step
    from megatron_btx.weights.megatron import open_megatron

    distributed.initialize(layout, 1234)
    # As the trainer's own defaults are.
    training = Training(
        lr=1e-3, min_lr=0.0, lr_warmup_iters=0, lr_decay_style="linear", weight_decay=0.01,
        adam_beta2=0.999, adam_eps=1e-8, precision="fp32",
    )  # fmt: skip
    checkpoint = open_megatron(step, "m")
    architecture = replace(checkpoint.architecture, routing=routing)
    model = build_model(architecture, layout, "fp32", random_seed=1234)
    initialize(model, replace(copy(checkpoint, dtype=torch.float32), architecture=architecture))
    ddp = wrap_ddp(model, use_distributed_optimizer=False)
    optimizer = build_optimizer(ddp, training)
    schedule = build_schedule(optimizer, training, 10)
    ranks = layout.data_parallel_size
    rank = torch.distributed.get_rank() // layout.tensor_model_parallel_size

    def micro_batches(number: int) -> Any:
        for at, part in list(enumerate(batches[number].split(2)))[rank::ranks]:
            yield {
                "tokens": part[:, :-1].contiguous(),
                "labels": part[:, 1:].contiguous(),
                "loss_mask": torch.ones(2, LENGTH),
                "position_ids": torch.arange(LENGTH).expand(2, -1).contiguous(),
                "samples": torch.arange(2) + 4 * number + 2 * at,
            }

    return [
        train_step(
            ddp,
            optimizer,
            schedule,
            micro_batches(number),
            step=number,
            num_microbatches=2 // ranks,
            micro_batch_size=2,
            seq_length=LENGTH,
        ).loss
        for number in range(len(batches))
    ]


def theirs(pool: Ranks, world: int, job: trainer.Job) -> tuple[list[float], trainer.Outcome]:
    """The losses of the trainer's steps, over all ranks, and what the first one saw."""
    found = pool.run(trainer.run, world, job, timeout=600)
    steps = zip(*(each.losses for each in found), strict=True)
    return [sum(step) / world for step in steps], found[0]


def resumed(words: list[str], load: Path) -> list[str]:
    """The arguments with which it goes on from its own checkpoint, optimizer and all."""
    fresh = ("--finetune", "--no-load-optim", "--no-load-rng")
    words = [word for word in words if word not in ("", *fresh)]
    words[words.index("--load") + 1] = str(load)
    return words


@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_we_do(
    case: str, written: Any, pool: Ranks, ranks: Ranks, tmp_path: Path
) -> None:
    """Three steps, saved, and two more after loading that."""
    routing, layout, spec = CASES[case]
    step = written["mixtral"][1]
    world, tp, more = LAYOUTS[layout]
    base = words_for(step, tp)
    if SAMPLE[0] in spec:
        del base[(at := base.index(SAMPLE[0])) : at + 2]
    base.append("--no-create-attention-mask-in-dataloader")
    words = [*base, *more, *spec, "--save", str(tmp_path)]
    job = trainer.Job(words, TOKENS, steps=3, batches=BATCHES[:3], compute=routing.type == "topk")
    first, outcome = theirs(pool, world, job)
    job = trainer.Job(
        resumed(words, tmp_path), TOKENS, steps=2, batches=BATCHES[3:], compute=job.compute
    )
    second, _ = theirs(pool, world, job)
    ep = 2 if more else 1
    shape = Layout(
        tensor_model_parallel_size=tp,
        data_parallel_size=world // tp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
    )
    expected = ranks.run(ours, world, step, routing, shape, BATCHES, timeout=600)[0]
    assert first + second == pytest.approx(expected, abs=TOLERANCE)
    if case != "topk":
        return
    export(tmp_path / "iter_0000003", tmp_path / "hf", {})
    close(losses_of(tmp_path / "hf"), outcome.after)
    # Without the flag it is its own router's training: this test can fail.
    without = base[:-1]  # but for the mask, which its own attention takes
    plain, _ = theirs(pool, 1, trainer.Job(without, TOKENS, steps=3, batches=BATCHES[:3]))
    assert abs(plain[2] - expected[2]) > 10 * TOLERANCE


REFUSED = {  # the function, arguments beside those of the tool, what is said
    "topk": (
        "--moe-router-score-function sigmoid --position-embedding-type learned_absolute "
        "--moe-router-load-balancing-type global_aux_loss --attention-dropout 0.1 --use-mup "
        "--moe-router-dtype fp64 --moe-router-fusion --reset-attention-mask",
        (
            "--moe-router-score-function: 'sigmoid' is not followed",
            "position_embedding_type is 'learned_absolute'",
            "--moe-router-load-balancing-type: 'global_aux_loss' is not followed",
            "--attention-dropout: 0.1 is not followed",
            "--use-mup: True is not followed",
            "--moe-router-fusion: True is not followed",
            "--reset-attention-mask: attention without Transformer Engine is causal",
            "fix: say --no-create-attention-mask-in-dataloader",
        ),
    ),
    "switch": (
        "",
        (
            "--moe-router-topk: is 2, and switch routes with 1",
            "fix: say --moe-router-pre-softmax",
            "fix: say --moe-expert-capacity-factor 1.5",
            "fix: say --moe-token-drop-policy position",
        ),
    ),
    "soft": ("", ("--moe-router-topk: is 2, and soft routes with 4", "say --moe-router-topk 4")),
    "of_its_own": (
        "--moe-aux-loss-coeff 0.01",
        ("--moe-aux-loss-coeff: is 0.01, and topk routes with 0.0", "say --moe-router-topk 3"),
    ),
}


def of_its_own(config: Any) -> Any:
    from megatron_btx import megatron_lm_spec

    return megatron_lm_spec(Routing(moe_router_topk=3))(config)


def refusals(words: list[str], more: dict[str, str]) -> dict[str, str]:
    """What each of the functions says, of a configuration that the trainer has parsed."""
    return {name: trainer.refusal([*words, *each.split()], name) for name, each in more.items()}


def test_what_the_layers_would_pass_over_is_refused(written: Any, pool: Ranks) -> None:
    words = words_for(written["mixtral"][1], 1)
    (found,) = pool.run(refusals, 1, words, {name: more for name, (more, _) in REFUSED.items()})
    for name, (_, wanted) in REFUSED.items():
        assert [each for each in wanted if each not in found[name]] == [], found[name]
    assert "--moe-router-dtype" not in found["topk"]
