"""Every layout trains as one rank does: losses, every gradient, every weight, every replica.

Tolerances. fp32: a gradient is a sum over tokens and features whose order depends on the layout;
both sides carry rounding of about 1e-7 of the largest term a reduction, so gradients agree to 2e-5
of the tensor's largest entry. Weights are compared by what training has changed of them, in the L2
norm, so that an untrained one is at distance 1: 1e-5 was measured, the norms' weights the farthest,
which lie near one and keep 1e-7 of that; ten times as much is allowed. bf16 has 8 bits: 2^-8 of
relative error an operation, and a weight near one moves in steps of 4e-3, where five optimizer
steps of 1e-3 come to about one; 0.29 was measured.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_btx.recipe.schema import Layout, MegatronOptions
from tests.engine.harness import DENSE, MOE, Case, Trained, assemble, named_tensor, train
from tests.ranks import Ranks

TP2 = Layout(tensor_model_parallel_size=2)
PP2 = Layout(pipeline_model_parallel_size=2)
PP2_VP2 = replace(PP2, virtual_pipeline_model_parallel_size=2)
DP2 = Layout(data_parallel_size=2)
EP2 = Layout(data_parallel_size=2, expert_model_parallel_size=2)
EP4 = Layout(data_parallel_size=4, expert_model_parallel_size=4)
TP2_ETP2 = Layout(tensor_model_parallel_size=2, expert_tensor_parallel_size=2)
TP2_EP2 = Layout(
    tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1
)
TP2_PP2_EP2 = replace(TP2_EP2, pipeline_model_parallel_size=2)
PP2_VP2_EP2 = replace(EP2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
TP2_DP2_EP2 = replace(TP2_EP2, data_parallel_size=2)

RECOMPUTE = MegatronOptions(
    transformer={
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
)
OVERLAP = MegatronOptions(
    ddp={"overlap_grad_reduce": True, "overlap_param_gather": True},
    optimizer={"overlap_param_gather": True},
)

TIED = replace(DENSE, model=replace(DENSE.model, untie_embeddings_and_output_weights=False))

RELATIVE = replace(
    DENSE,
    model=replace(DENSE.model, add_qkv_bias=True, qk_layernorm=True, window_size=(5, 0)),
)
"""What Llama's relatives have besides."""
SCALED = replace(
    RELATIVE,
    model=replace(
        RELATIVE.model,
        no_rope_freq=(0, 1) * (DENSE.model.num_layers // 2),
        softmax_scale=0.2,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        logits_scaling=2.0,
    ),
)
"""And what Granite and SmolLM3 have."""
SHARED = replace(
    MOE,
    model=replace(
        RELATIVE.model, moe_shared_expert_intermediate_size=24, moe_shared_expert_gate=True
    ),
)

CASES = {
    "relative-tp2": Case(RELATIVE, TP2),
    "scaled-tp2-sp": Case(SCALED, replace(TP2, sequence_parallel=True)),
    "shared-expert-ep2": Case(SHARED, EP2),
    "shared-expert-tp2-dp2-ep2": Case(SHARED, TP2_DP2_EP2),
    "shared-expert-tp2-pp2-ep2": Case(SHARED, TP2_PP2_EP2),
    "dense-tied-pp2": Case(TIED, PP2),
    "dense-tied-tp2": Case(TIED, TP2),
    "dense-tp2": Case(DENSE, TP2),
    "dense-tp2-sp": Case(DENSE, replace(TP2, sequence_parallel=True)),
    "dense-pp2": Case(DENSE, PP2),
    "dense-pp2-vp2": Case(DENSE, PP2_VP2),
    "dense-tied-pp2-vp2": Case(TIED, PP2_VP2),
    "moe-pp2-vp2-ep2-distopt": Case(MOE, PP2_VP2_EP2, use_distributed_optimizer=True),
    "moe-pp2-vp2-ep2-overlap-distopt": Case(
        MOE, PP2_VP2_EP2, use_distributed_optimizer=True, megatron=OVERLAP
    ),
    "shared-expert-tp2-pp2-vp2-ep2-recompute": Case(
        SHARED,
        replace(TP2_PP2_EP2, virtual_pipeline_model_parallel_size=2),
        megatron=RECOMPUTE,
    ),
    "dense-dp2": Case(DENSE, DP2),
    "dense-dp2-distopt": Case(DENSE, DP2, use_distributed_optimizer=True),
    "moe-pp2": Case(MOE, PP2),
    "moe-dp2": Case(MOE, DP2),
    "moe-ep2": Case(MOE, EP2),
    "moe-ep2-distopt": Case(MOE, EP2, use_distributed_optimizer=True),
    "moe-ep4": Case(MOE, EP4),
    "moe-ep4-distopt": Case(MOE, EP4, use_distributed_optimizer=True),
    "moe-tp2-etp2": Case(MOE, TP2_ETP2),
    "moe-tp2-ep2": Case(MOE, TP2_EP2),
    "moe-tp2-dp2-ep2": Case(MOE, TP2_DP2_EP2),
    "moe-tp2-dp2-ep2-distopt": Case(MOE, TP2_DP2_EP2, use_distributed_optimizer=True),
    "moe-tp2-pp2-ep2": Case(MOE, TP2_PP2_EP2),
    "moe-tp2-pp2-ep2-distopt": Case(MOE, TP2_PP2_EP2, use_distributed_optimizer=True),
    "moe-tp2-etp2-distopt": Case(MOE, TP2_ETP2, use_distributed_optimizer=True),
    "moe-tp2-pp2-ep2-recompute": Case(MOE, TP2_PP2_EP2, megatron=RECOMPUTE),
    "moe-ep2-overlap-distopt": Case(MOE, EP2, use_distributed_optimizer=True, megatron=OVERLAP),
    "documents-dense-dp2-pp2": Case(DENSE, replace(DP2, pipeline_model_parallel_size=2), eos_id=1),
    "documents-moe-tp2-ep2-recompute": Case(MOE, TP2_EP2, megatron=RECOMPUTE, eos_id=1),
    "bf16-dense-tp2": Case(DENSE, TP2, "bf16"),
    "bf16-dense-dp2-distopt": Case(DENSE, DP2, "bf16", use_distributed_optimizer=True),
    "bf16-dense-pp2": Case(DENSE, PP2, "bf16"),
    "bf16-moe-ep2": Case(MOE, EP2, "bf16"),
    "bf16-moe-ep2-distopt": Case(MOE, EP2, "bf16", use_distributed_optimizer=True),
    "bf16-moe-ep4": Case(MOE, EP4, "bf16"),
    "bf16-moe-tp2-etp2": Case(MOE, TP2_ETP2, "bf16"),
    "bf16-moe-tp2-ep2": Case(MOE, TP2_EP2, "bf16"),
    "bf16-moe-tp2-pp2-ep2": Case(MOE, TP2_PP2_EP2, "bf16"),
    "bf16-moe-tp2-pp2-ep2-distopt": Case(MOE, TP2_PP2_EP2, "bf16", use_distributed_optimizer=True),
}
LOSS = {"fp32": 1e-5, "bf16": 3e-2}
GRADIENT = {"fp32": 2e-5, "bf16": 6e-2}
UPDATE = {"fp32": 1e-4, "bf16": 0.4}

_references: dict[tuple[object, ...], Trained] = {}


def reference(ranks: Ranks, case: Case) -> Trained:
    """The same case on one rank, run once a session."""
    alone = Case(case.architecture, precision=case.precision, eos_id=case.eos_id)
    key = (alone.architecture, alone.precision, alone.eos_id)
    if key not in _references:
        _references[key] = ranks.run(train, 1, alone)[0]
    return _references[key]


@pytest.mark.parametrize("name", CASES)
def test_as_one_rank(name: str, ranks: Ranks) -> None:
    case = CASES[name]
    alone = reference(ranks, case)
    together = ranks.run(train, case.layout.world_size, case)

    assert alone.losses[-1] < alone.losses[0], "five steps should have learned something"
    for rank in together:
        np.testing.assert_allclose(rank.losses, alone.losses, atol=LOSS[case.precision], rtol=0)
        np.testing.assert_allclose(
            rank.grad_norms, alone.grad_norms, rtol=10 * GRADIENT[case.precision]
        )
    expected = assemble([alone.first_gradients])
    found = assemble([rank.first_gradients for rank in together])
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        scale = np.abs(gradient).max()
        assert scale > 0, f"{key}: the reference has no gradient"
        np.testing.assert_allclose(
            found[key], gradient, rtol=0, atol=GRADIENT[case.precision] * scale, err_msg=key
        )
    expected = assemble([alone.weights])
    found = assemble([rank.weights for rank in together])
    for key, weight in expected.items():
        update = weight - named_tensor(key, weight.shape).numpy()
        distance = np.linalg.norm(found[key] - weight) / np.linalg.norm(update)
        assert distance < UPDATE[case.precision], f"{key}: {distance}"
