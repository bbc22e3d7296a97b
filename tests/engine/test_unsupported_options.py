"""The ``megatron:`` block: what would not be followed is refused, by its key."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_btx.engine.model import build_model, data_parallel_config, transformer_config
from megatron_btx.engine.optimizer import optimizer_config
from megatron_btx.engine.platform import detect
from megatron_btx.engine.unsupported_options import TORCH_LAYERS
from megatron_btx.errors import UserError
from megatron_btx.recipe import megatron_fields
from megatron_btx.recipe.schema import Layout, MegatronOptions, Training
from tests.engine.harness import DENSE, MOE, Case, train
from tests.ranks import Ranks

ASKED: dict[str, Any] = {
    "attention_dropout": 0.1,
    "cross_entropy_fusion_impl": "te",
    "cuda_graph_impl": "local",
    "fp4": "e2m1",
    "fp8": "hybrid",
}


@pytest.mark.skipif(detect().use_transformer_engine, reason="its layers do these")
@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_what_torchs_layers_do_not_do(name: str) -> None:
    assert name in megatron_fields.fields("transformer"), "gone from this Megatron-Core"
    options = MegatronOptions(transformer={name: ASKED.get(name, True)})
    with pytest.raises(UserError, match=f"megatron.transformer.{name}: .* is not supported by"):
        transformer_config(MOE, Layout(), "bf16", options)


def test_what_the_router_does_not_do_is_told_before_a_model_is_built() -> None:
    options = MegatronOptions(transformer={"moe_token_dispatcher_type": "flex"})
    with pytest.raises(UserError, match="moe_token_dispatcher_type: 'flex' is not supported"):
        transformer_config(MOE, Layout(), "fp32", options)


def test_megatrons_own_refusals_are_a_users_errors() -> None:
    with pytest.raises(UserError, match="^megatron.transformer: Megatron-Core refuses"):
        transformer_config(DENSE, Layout(), "fp32", MegatronOptions(transformer={"fp8_param": 1}))
    with pytest.raises(UserError, match="^megatron.ddp.overlap_param_gather"):
        data_parallel_config(False, MegatronOptions(ddp={"overlap_param_gather": True}))
    precise = MegatronOptions(optimizer={"use_precision_aware_optimizer": True})
    with pytest.raises(UserError, match="^megatron.optimizer: Megatron-Core refuses"):
        optimizer_config(Training(megatron=precise))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("calculate_per_token_loss", True),
        ("perform_initialization", False),
        ("softmax_type", "off-by-one"),
        ("qk_l2_norm", True),
    ],
)
def test_what_would_be_another_computation(name: str, value: object) -> None:
    problem = megatron_fields.problem("transformer", name, value)
    assert problem is not None
    assert problem[0].startswith("cannot be set: ")


@pytest.mark.parametrize("modules", [["layernorm"], ["core_attn"], ["moe"], ["moe_act"], ["mlp"]])
def test_selective_recomputation_changes_no_bit(modules: list[str], ranks: Ranks) -> None:
    again = {"recompute_granularity": "selective", "recompute_modules": modules}
    options = MegatronOptions(transformer=again)
    plain, recomputed = (
        ranks.run(train, 1, Case(MOE, megatron=which, steps=2))[0]
        for which in (MegatronOptions(), options)
    )
    assert recomputed.losses == plain.losses
    assert recomputed.grad_norms == plain.grad_norms


def test_experts_divide_over_ranks() -> None:
    layout = Layout(data_parallel_size=3, expert_model_parallel_size=3)
    with pytest.raises(UserError, match="is 3, which does not divide 4 experts"):
        build_model(MOE, layout, "fp32")
