"""Mixtral: Llama with experts; what a finished BTX model is handed back as."""

from __future__ import annotations

from megatron_btx.families.family import Family
from megatron_btx.families.llama import ATTENTION, HEAD
from megatron_btx.families.table import Table, gate_up

# fmt: off
EXPERTS = (
    ("decoder.layers.{layer}.pre_mlp_layernorm.weight",
        ("model.layers.{layer}.post_attention_layernorm.weight",), None),
    ("decoder.layers.{layer}.mlp.router.weight",
        ("model.layers.{layer}.block_sparse_moe.gate.weight",), None),
    ("decoder.layers.{layer}.mlp.experts.{expert}.linear_fc1.weight",
        ("model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
         "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight"), gate_up),
    ("decoder.layers.{layer}.mlp.experts.{expert}.linear_fc2.weight",
        ("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",), None),
)
# fmt: on

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    table=Table((*ATTENTION, *EXPERTS, *HEAD)),
    default_rope_theta=1e6,
    fixed={
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    },
    is_moe=True,
)
