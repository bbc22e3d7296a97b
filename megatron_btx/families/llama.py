"""Llama and its dense relatives: where each weight gets its Megatron name, and what their
``config.json`` have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_btx.families.config import (
    Always,
    ConfigPart,
    ConfigReading,
    Field,
    Fixed,
    OwnCode,
    Stated,
    Tied,
    Unread,
)
from megatron_btx.families.family import Family
from megatron_btx.families.positions import LayerWindows, NoRope, Positions, Rope, Window
from megatron_btx.families.table import Row, Table, fused_qkv, gate_up, qkv
from megatron_btx.recipe.architecture import Architecture

# fmt: off
LAYER, HF = "decoder.layers.{layer}.", "model.layers.{layer}."

EMBEDDING: tuple[Row, ...] = (
    ("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), None),
)
ATTENTION: tuple[Row, ...] = (
    (LAYER + "self_attention.linear_qkv.layer_norm_weight",
        (HF + "input_layernorm.weight",), None),
    (LAYER + "self_attention.linear_qkv.weight",
        (HF + "self_attn.q_proj.weight",
         HF + "self_attn.k_proj.weight",
         HF + "self_attn.v_proj.weight"), qkv),
    (LAYER + "self_attention.linear_proj.weight", (HF + "self_attn.o_proj.weight",), None),
)
QKV_BIAS: tuple[Row, ...] = (
    (LAYER + "self_attention.linear_qkv.bias",
        (HF + "self_attn.q_proj.bias",
         HF + "self_attn.k_proj.bias",
         HF + "self_attn.v_proj.bias"), qkv),
)
HEAD_NORMS: tuple[Row, ...] = (
    (LAYER + "self_attention.q_layernorm.weight", (HF + "self_attn.q_norm.weight",), None),
    (LAYER + "self_attention.k_layernorm.weight", (HF + "self_attn.k_norm.weight",), None),
)
FFN: tuple[Row, ...] = (
    (LAYER + "mlp.linear_fc1.layer_norm_weight", (HF + "post_attention_layernorm.weight",), None),
    (LAYER + "mlp.linear_fc1.weight",
        (HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight"), gate_up),
    (LAYER + "mlp.linear_fc2.weight", (HF + "mlp.down_proj.weight",), None),
)
FUSED_QKV: tuple[Row, ...] = (
    ATTENTION[0],
    (LAYER + "self_attention.linear_qkv.weight",
        (HF + "self_attn.qkv_proj.weight",), fused_qkv),
    ATTENTION[2],
)
FUSED_GATE_UP: tuple[Row, ...] = (
    FFN[0],
    (LAYER + "mlp.linear_fc1.weight", (HF + "mlp.gate_up_proj.weight",), None),
    FFN[2],
)
HEAD: tuple[Row, ...] = (
    ("decoder.final_layernorm.weight", ("model.norm.weight",), None),
    ("output_layer.weight", ("lm_head.weight",), None),
)
# fmt: on


@dataclass(frozen=True)
class HeadDim:
    """``head_dim`` in a family whose configuration does not have it: some makers write the one that
    is computed without. Another is refused, as not every loader of the family reads the key."""

    def read(self, reading: ConfigReading) -> None:
        """Nothing else than ``hidden_size / num_attention_heads``."""
        given = reading.typed(int, "head_dim", None)
        width = reading.typed(int, "hidden_size", 0)
        heads = reading.typed(int, "num_attention_heads", 0)
        if given is not None and given * heads != width:
            what = f"head_dim is {given}, for {heads} heads and hidden_size {width}"
            reading.refuse(f"{what}; only hidden_size / num_attention_heads is supported")

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """Nothing."""
        return {}


_FIELDS: tuple[ConfigPart, ...] = (
    Field("num_hidden_layers", "num_layers", required=True),
    Field("hidden_size", "hidden_size", required=True),
    Field("num_attention_heads", "num_attention_heads", required=True),
    Field("rms_norm_eps", "layernorm_epsilon", required=True),
    Field("initializer_range", "init_method_std"),
    Positions(),
    Fixed("hidden_act", "silu", also=("swish",)),  # one function in ACT2FN
    Stated("is_causal", True),  # transformers 5 masks nothing where it is false
)
FIELDS: tuple[ConfigPart, ...] = (*_FIELDS, Tied())
"""What all of them have."""
WIDTH = Field("intermediate_size", "ffn_hidden_size", required=True)
GROUPS = Field("num_key_value_heads", "num_query_groups", required=True, nullable=True)
"""Where it is null, there are as many as heads; where absent, each family has another number, but
for Llama, Phi-3 and Granite, of which it is not required."""
HEAD_DIM = Field("head_dim", "kv_channels")

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    table=Table((*EMBEDDING, *ATTENTION, *FFN, *HEAD)),
    config=(
        *FIELDS,
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
    config=(*FIELDS, WIDTH, GROUPS, HEAD_DIM, Rope(1e4), Window(absent=4096)),
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    table=Table((*EMBEDDING, *ATTENTION, *QKV_BIAS, *FFN, *HEAD)),
    config=(
        *FIELDS,
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
        *FIELDS,
        WIDTH,
        GROUPS,
        Field("head_dim", "kv_channels", required=True),  # absent, it is 128
        Rope(1e4),
        LayerWindows(from_layer=True),
        Always("qk_layernorm", True),
        Fixed("attention_bias", False),
    ),
)
PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    table=Table((*EMBEDDING, *FUSED_QKV, *FUSED_GATE_UP, *HEAD)),
    config=(
        *FIELDS,
        WIDTH,
        Field("num_key_value_heads", "num_query_groups"),
        Rope(1e4, kinds=("default",)),
        Window(),
        Stated("attention_bias", False),
        Stated("partial_rotary_factor", 1.0),
        Unread("original_max_position_embeddings"),  # only longrope's
        HeadDim(),
        # Its makers' own code, which is that of transformers.
        OwnCode(
            {
                "AutoConfig": "configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            },
        ),
    ),
)
MULTIPLIERS: tuple[ConfigPart, ...] = (
    Field("attention_multiplier", "softmax_scale", default=1.0, nullable=True),  # null: 1 / sqrt(d)
    Field("embedding_multiplier", "embedding_multiplier", default=1.0),
    Field("residual_multiplier", "residual_multiplier", default=1.0),
    Field("logits_scaling", "logits_scaling", default=1.0),
)
"""Granite's. They stay what they are: folded into the weights, 0.22 would not come out again."""
GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    table=LLAMA.table,
    config=(
        *FIELDS,
        WIDTH,
        Field("num_key_value_heads", "num_query_groups"),
        HeadDim(),
        Rope(1e4),
        *MULTIPLIERS,
        Fixed("attention_bias", False),
        Fixed("mlp_bias", False),
    ),
)
SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    table=LLAMA.table,
    config=(
        *_FIELDS,
        Tied(absent=True),
        WIDTH,
        GROUPS,
        HeadDim(),
        Rope(2e6),
        NoRope(),
        LayerWindows(from_layer=False, absent=None),
        Fixed("attention_bias", False),
        Fixed("mlp_bias", False),
    ),
)
