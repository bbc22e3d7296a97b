"""The mixtures of experts, Mixtral and Qwen's: the rows that a dense model does not have."""

from __future__ import annotations

from megatron_btx.families.config import Always, Experts, ExpertWidth, Field, Fixed
from megatron_btx.families.family import Family
from megatron_btx.families.llama import (
    ATTENTION,
    EMBEDDING,
    FIELDS,
    GROUPS,
    HEAD,
    HEAD_DIM,
    HEAD_NORMS,
    HF,
    LAYER,
    QKV_BIAS,
    WIDTH,
)
from megatron_btx.families.positions import LayerWindows, Rope, Window
from megatron_btx.families.table import Row, Table, expert_gate_up, shared_gate_up

# fmt: off
MOE_NORM: tuple[Row, ...] = (
    (LAYER + "pre_mlp_layernorm.weight", (HF + "post_attention_layernorm.weight",), None),
)


def experts(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Router and experts, tensor by tensor, under a family's own words."""
    mlp, each = HF + block + ".", HF + block + ".experts.{expert}."
    return (
        (LAYER + "mlp.router.weight", (mlp + "gate.weight",), None),
        (LAYER + "mlp.experts.{expert}.linear_fc1.weight",
            (each + gate + ".weight", each + up + ".weight"), expert_gate_up),
        (LAYER + "mlp.experts.{expert}.linear_fc2.weight", (each + down + ".weight",), None),
    )


FUSED_EXPERTS: tuple[Row, ...] = (
    (LAYER + "mlp.router.weight", (HF + "mlp.gate.weight",), None),
    (LAYER + "mlp.experts.{expert}.linear_fc1.weight", (HF + "mlp.experts.gate_up_proj",), None),
    (LAYER + "mlp.experts.{expert}.linear_fc2.weight", (HF + "mlp.experts.down_proj",), None),
)
"""The same as ``transformers`` 5 holds them in memory: all experts' tensors stacked, gate above up.
"""
SHARED_EXPERT: tuple[Row, ...] = (
    (LAYER + "mlp.shared_experts.linear_fc1.weight",
        (HF + "mlp.shared_expert.gate_proj.weight",
         HF + "mlp.shared_expert.up_proj.weight"), shared_gate_up),
    (LAYER + "mlp.shared_experts.linear_fc2.weight",
        (HF + "mlp.shared_expert.down_proj.weight",), None),
    (LAYER + "mlp.shared_experts.gate_weight", (HF + "mlp.shared_expert_gate.weight",), None),
)
# fmt: on

_QWEN_EXPERTS = experts("mlp", "gate_proj", "up_proj", "down_proj")
_EVERY_LAYER = (Fixed("decoder_sparse_step", 1), Fixed("mlp_only_layers", []))


def _table(attention: tuple[Row, ...], ffn: tuple[Row, ...]) -> Table:
    return Table((*EMBEDDING, *attention, *MOE_NORM, *ffn, *HEAD))


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    table=_table(ATTENTION, experts("block_sparse_moe", "w1", "w3", "w2")),
    fused=_table(ATTENTION, FUSED_EXPERTS),
    config=(
        *FIELDS,
        ExpertWidth("intermediate_size"),
        GROUPS,
        HEAD_DIM,
        Rope(1e6),
        Window(),
        Experts(("num_local_experts",), normalised=True),
        Fixed("router_jitter_noise", 0.0),
    ),
)
QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    table=_table((*ATTENTION, *QKV_BIAS), (*_QWEN_EXPERTS, *SHARED_EXPERT)),
    fused=_table((*ATTENTION, *QKV_BIAS), (*FUSED_EXPERTS, *SHARED_EXPERT)),
    has_shared_expert=True,
    config=(
        *FIELDS,
        WIDTH,  # of layers without experts, of which there are none
        ExpertWidth("moe_intermediate_size"),
        Field(
            "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", required=True
        ),
        Always("moe_shared_expert_gate", True),
        Field("qkv_bias", "add_qkv_bias", default=True),
        GROUPS,
        HEAD_DIM,
        Rope(1e4),
        LayerWindows(from_layer=False),
        Experts(("num_experts", "num_local_experts")),
        *_EVERY_LAYER,
    ),
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    table=_table((*ATTENTION, *HEAD_NORMS), _QWEN_EXPERTS),
    fused=_table((*ATTENTION, *HEAD_NORMS), FUSED_EXPERTS),
    config=(
        *FIELDS,
        WIDTH,
        ExpertWidth("moe_intermediate_size"),
        Always("qk_layernorm", True),
        Fixed("attention_bias", False),
        GROUPS,
        HEAD_DIM,
        Rope(1e4),
        Window(absent=4096, switch=True),
        Experts(("num_experts", "num_local_experts")),
        *_EVERY_LAYER,
    ),
)
