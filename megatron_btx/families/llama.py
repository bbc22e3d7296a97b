"""Llama: RMSNorm, SwiGLU, rotary positions, no biases."""

from __future__ import annotations

from megatron_btx.families.family import Family
from megatron_btx.families.table import Table, gate_up, qkv

# fmt: off
ATTENTION = (
    ("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), None),
    ("decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
        ("model.layers.{layer}.input_layernorm.weight",), None),
    ("decoder.layers.{layer}.self_attention.linear_qkv.weight",
        ("model.layers.{layer}.self_attn.q_proj.weight",
         "model.layers.{layer}.self_attn.k_proj.weight",
         "model.layers.{layer}.self_attn.v_proj.weight"), qkv),
    ("decoder.layers.{layer}.self_attention.linear_proj.weight",
        ("model.layers.{layer}.self_attn.o_proj.weight",), None),
)
HEAD = (
    ("decoder.final_layernorm.weight", ("model.norm.weight",), None),
    ("output_layer.weight", ("lm_head.weight",), None),
)
FFN = (
    ("decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
        ("model.layers.{layer}.post_attention_layernorm.weight",), None),
    ("decoder.layers.{layer}.mlp.linear_fc1.weight",
        ("model.layers.{layer}.mlp.gate_proj.weight",
         "model.layers.{layer}.mlp.up_proj.weight"), gate_up),
    ("decoder.layers.{layer}.mlp.linear_fc2.weight",
        ("model.layers.{layer}.mlp.down_proj.weight",), None),
)
# fmt: on

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    table=Table((*ATTENTION, *FFN, *HEAD)),
    default_rope_theta=1e4,
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "pretraining_tp": 1,
    },
    is_moe=False,
)
