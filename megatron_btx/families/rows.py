"""Rows that families share: canonical names against Hugging Face's."""

from __future__ import annotations

from megatron_btx.families.table import Row, expert_gate_up, gate_up, qkv, shared_gate_up

# fmt: off
_LAYER, _HF = "decoder.layers.{layer}.", "model.layers.{layer}."

EMBEDDING: tuple[Row, ...] = (
    ("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), None),
)
ATTENTION: tuple[Row, ...] = (
    (_LAYER + "self_attention.linear_qkv.layer_norm_weight",
        (_HF + "input_layernorm.weight",), None),
    (_LAYER + "self_attention.linear_qkv.weight",
        (_HF + "self_attn.q_proj.weight",
         _HF + "self_attn.k_proj.weight",
         _HF + "self_attn.v_proj.weight"), qkv),
    (_LAYER + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), None),
)
QKV_BIAS: tuple[Row, ...] = (
    (_LAYER + "self_attention.linear_qkv.bias",
        (_HF + "self_attn.q_proj.bias",
         _HF + "self_attn.k_proj.bias",
         _HF + "self_attn.v_proj.bias"), qkv),
)
HEAD_NORMS: tuple[Row, ...] = (
    (_LAYER + "self_attention.q_layernorm.weight", (_HF + "self_attn.q_norm.weight",), None),
    (_LAYER + "self_attention.k_layernorm.weight", (_HF + "self_attn.k_norm.weight",), None),
)
FFN: tuple[Row, ...] = (
    (_LAYER + "mlp.linear_fc1.layer_norm_weight", (_HF + "post_attention_layernorm.weight",), None),
    (_LAYER + "mlp.linear_fc1.weight",
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"), gate_up),
    (_LAYER + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), None),
)
MOE_NORM: tuple[Row, ...] = (
    (_LAYER + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), None),
)
HEAD: tuple[Row, ...] = (
    ("decoder.final_layernorm.weight", ("model.norm.weight",), None),
    ("output_layer.weight", ("lm_head.weight",), None),
)


def experts(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Router and experts, tensor by tensor, under a family's own words."""
    mlp, each = _HF + block + ".", _HF + block + ".experts.{expert}."
    return (
        (_LAYER + "mlp.router.weight", (mlp + "gate.weight",), None),
        (_LAYER + "mlp.experts.{expert}.linear_fc1.weight",
            (each + gate + ".weight", each + up + ".weight"), expert_gate_up),
        (_LAYER + "mlp.experts.{expert}.linear_fc2.weight", (each + down + ".weight",), None),
    )


FUSED_EXPERTS: tuple[Row, ...] = (
    (_LAYER + "mlp.router.weight", (_HF + "mlp.gate.weight",), None),
    (_LAYER + "mlp.experts.{expert}.linear_fc1.weight", (_HF + "mlp.experts.gate_up_proj",), None),
    (_LAYER + "mlp.experts.{expert}.linear_fc2.weight", (_HF + "mlp.experts.down_proj",), None),
)
"""The same as ``transformers`` 5 holds them in memory: all experts' tensors stacked, gate above up.
"""
SHARED_EXPERT: tuple[Row, ...] = (
    (_LAYER + "mlp.shared_experts.linear_fc1.weight",
        (_HF + "mlp.shared_expert.gate_proj.weight",
         _HF + "mlp.shared_expert.up_proj.weight"), shared_gate_up),
    (_LAYER + "mlp.shared_experts.linear_fc2.weight",
        (_HF + "mlp.shared_expert.down_proj.weight",), None),
    (_LAYER + "mlp.shared_experts.gate_weight", (_HF + "mlp.shared_expert_gate.weight",), None),
)
# fmt: on
