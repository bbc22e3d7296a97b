"""Virtual pipeline stages beside their layouts' test: what is in flight, held-out loss, the
initializer, replicas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_btx.engine.model import transformer_config
from megatron_btx.errors import UserError
from megatron_btx.recipe import check_layout, memory
from megatron_btx.recipe.schema import Layout, MegatronOptions
from tests.engine.harness import DENSE, Case, Pieces, assemble, microbatches, pieces
from tests.ranks import Ranks
from tests.weights.models import moe_plan

PP2 = Layout(pipeline_model_parallel_size=2)
PP2_VP2 = replace(PP2, virtual_pipeline_model_parallel_size=2)


def passes(case: Case) -> int:
    """Most passes whose activations a rank held at once, over one step."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_btx.engine import distributed
    from megatron_btx.engine.model import build_model, for_chunks, model_chunks, wrap_ddp
    from megatron_btx.train.step import forward_step

    distributed.initialize(case.layout, case.random_seed)
    model = build_model(case.architecture, case.layout, "fp32")
    held: list[int] = [0, 0]

    def forward(_module: object, _inputs: object, output: torch.Tensor) -> None:
        held[0] += 1
        held[1] = max(held)
        output.register_hook(backward)

    def backward(_gradient: torch.Tensor) -> None:
        held[0] -= 1

    for piece in model_chunks(model):
        piece.register_forward_hook(forward)
    ddp = wrap_ddp(model, use_distributed_optimizer=False)
    micro = list(microbatches(case, 0))
    get_forward_backward_func()(
        forward_step_func=lambda batches, piece: forward_step(batches, piece, step=0),
        data_iterator=for_chunks(ddp, iter(micro)),
        model=model_chunks(ddp),
        num_microbatches=len(micro),
        seq_length=case.architecture.model.seq_length,
        micro_batch_size=case.micro_batch_size,
        forward_only=False,
    )
    assert held[0] == 0
    return held[1]


@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("layout", [PP2, PP2_VP2])
def test_passes_in_flight_are_the_plans(layout: Layout, batch: int, ranks: Ranks) -> None:
    found = ranks.run(passes, 2, Case(DENSE, layout, global_batch_size=batch, micro_batch_size=1))
    assert found == [memory.in_flight(layout, stage, batch) for stage in range(2)]


def filled(layout: Layout) -> tuple[Pieces, float, list[list[float]]]:
    """A mix put into this rank's pieces by the initializer, its replicas compared; held-out loss
    and load of three sequences."""
    from megatron_btx.engine import distributed
    from megatron_btx.engine.initializer import initialize
    from megatron_btx.engine.model import build_model
    from megatron_btx.evaluate.heldout_loss import evaluate
    from megatron_btx.train.replicas import check_replicas

    distributed.initialize(layout, 7)
    plan = moe_plan()
    model = build_model(plan.architecture, layout, "fp32")
    initialize(model, plan)
    check_replicas(model, 0)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, plan.architecture.vocab_size, (3, 17), generator=generator)
    text = [
        {
            "tokens": row[:-1],
            "labels": row[1:],
            "loss_mask": torch.ones(16),
            "position_ids": torch.arange(16),
        }
        for row in ids
    ]
    seen = evaluate(model, {"text": text}, micro_batch_size=1)
    assert seen.load is not None
    return pieces(model, lambda parameter: parameter), seen.loss["text"], seen.load["text"]


def test_initializer_replicas_and_held_out_loss(ranks: Ranks) -> None:
    """As without virtual stages, though three sequences are no whole groups of two."""
    plain, virtual = (ranks.run(filled, 2, layout) for layout in (PP2, PP2_VP2))
    expected, found = (assemble([rank[0] for rank in each]) for each in (plain, virtual))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    for rank in virtual:
        assert rank[1] == pytest.approx(plain[0][1], abs=1e-6)
        assert rank[2] == plain[0][2]


@pytest.mark.parametrize(
    ("layout", "batches", "words"),
    [
        (replace(PP2_VP2, pipeline_model_parallel_size=1), 4, "without a pipeline"),
        (replace(PP2_VP2, virtual_pipeline_model_parallel_size=3), 4, "do not divide"),
        (PP2_VP2, 3, "needs a multiple of 2 micro-batches a step"),
    ],
)
def test_refused(layout: Layout, batches: int, words: str) -> None:
    wrong = [
        *check_layout._virtual(DENSE.model.num_layers, "seed.layout", layout),
        *check_layout.batches(layout, "seed.layout", batches),
    ]
    assert [words in one.what for one in wrong] == [True]
    assert wrong[0].key == "seed.layout.virtual_pipeline_model_parallel_size"


def test_batched_sends_are_refused() -> None:
    options = MegatronOptions(transformer={"overlap_p2p_comm": False, "batch_p2p_comm": True})
    with pytest.raises(UserError, match="only overlapped sends"):
        transformer_config(DENSE, PP2_VP2, "fp32", options)
