"""The mixtures of experts: Mixtral, which is Llama's, and Qwen's."""

from __future__ import annotations

from megatron_btx.families.config import Always, Experts, ExpertWidth, Field, Fixed
from megatron_btx.families.family import Family
from megatron_btx.families.llama import GROUPS, HEAD_DIM, LAYERS, WIDTH
from megatron_btx.families.positions import LayerWindows, Rope, Window
from megatron_btx.families.rows import (
    ATTENTION,
    EMBEDDING,
    FUSED_EXPERTS,
    HEAD,
    HEAD_NORMS,
    MOE_NORM,
    QKV_BIAS,
    SHARED_EXPERT,
    experts,
)
from megatron_btx.families.table import Row, Table

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
        *LAYERS,
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
        *LAYERS,
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
        *LAYERS,
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
