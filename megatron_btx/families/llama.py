"""Llama and its dense relatives, and what their ``config.json`` have in common."""

from __future__ import annotations

from megatron_btx.families.config import Always, Field, Fixed, Part, Stated, Tied
from megatron_btx.families.family import Family
from megatron_btx.families.positions import LayerWindows, Positions, Rope, Window
from megatron_btx.families.rows import ATTENTION, EMBEDDING, FFN, HEAD, HEAD_NORMS, QKV_BIAS
from megatron_btx.families.table import Table

LAYERS: tuple[Part, ...] = (
    Field("num_hidden_layers", "num_layers", required=True),
    Field("hidden_size", "hidden_size", required=True),
    Field("num_attention_heads", "num_attention_heads", required=True),
    Field("rms_norm_eps", "layernorm_epsilon", required=True),
    Field("initializer_range", "init_method_std"),
    Positions(),
    Tied(),
    Fixed("hidden_act", "silu"),
    Fixed("attention_dropout", 0.0),
)
"""What all of them have."""
WIDTH = Field("intermediate_size", "ffn_hidden_size", required=True)
GROUPS = Field("num_key_value_heads", "num_query_groups", required=True)
"""Not required of Llama: where it is absent, each of the others has another number."""
HEAD_DIM = Field("head_dim", "kv_channels")

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    table=Table((*EMBEDDING, *ATTENTION, *FFN, *HEAD)),
    config=(
        *LAYERS,
        WIDTH,
        Field("num_key_value_heads", "num_query_groups"),
        HEAD_DIM,
        Rope(1e4),
        Fixed("attention_bias", False),
        Fixed("mlp_bias", False),
        Stated("rope_interleaved", False),  # SmolLM2
        Stated("activation", "swiglu"),  # Falcon3
    ),
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    table=LLAMA.table,
    config=(*LAYERS, WIDTH, GROUPS, HEAD_DIM, Rope(1e4), Window(absent=4096)),
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    table=Table((*EMBEDDING, *ATTENTION, *QKV_BIAS, *FFN, *HEAD)),
    config=(
        *LAYERS,
        WIDTH,
        GROUPS,
        HEAD_DIM,
        Rope(1e4),
        LayerWindows(from_layer=True),
        Always("add_qkv_bias", True),
    ),
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    table=Table((*EMBEDDING, *ATTENTION, *HEAD_NORMS, *FFN, *HEAD)),
    config=(
        *LAYERS,
        WIDTH,
        GROUPS,
        Field("head_dim", "kv_channels", required=True),  # absent, it is 128
        Rope(1e4),
        LayerWindows(from_layer=True),
        Always("qk_layernorm", True),
        Fixed("attention_bias", False),
    ),
)
