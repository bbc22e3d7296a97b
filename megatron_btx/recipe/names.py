"""The canonical names and shapes of a model's tensors.

Canonical names are Megatron's (Transformer Engine's, where Megatron's two specs differ) with every
layer and expert numbered and nothing stacked, padded or split. Whatever a checkpoint stores, it is
seen under these names; whatever a plan builds, it builds these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.count import expert_width, kv_channels, qkv_width

Shape = tuple[int, ...]

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
QKV_NORM = "self_attention.linear_qkv.layer_norm_weight"
QKV = "self_attention.linear_qkv.weight"
QKV_BIAS = "self_attention.linear_qkv.bias"
Q_NORM = "self_attention.q_layernorm.weight"
K_NORM = "self_attention.k_layernorm.weight"
PROJ = "self_attention.linear_proj.weight"
DENSE_NORM = "mlp.linear_fc1.layer_norm_weight"
MOE_NORM = "pre_mlp_layernorm.weight"
ROUTER = "mlp.router.weight"
SHARED = "mlp.shared_experts"
SHARED_GATE = f"{SHARED}.gate_weight"


def is_part(expert: str, model: str) -> bool:
    """Whether an expert of the MoE is a model's: of its name, or a part or copy (``math.0.1``)."""
    return expert == model or re.fullmatch(rf"{re.escape(model)}(\.\d+)+", expert) is not None


def canonical_tensors(architecture: Architecture) -> dict[str, Shape]:
    """Canonical name -> global shape, in the order of the forward pass."""
    model, vocabulary = architecture.model, architecture.vocab_size
    shapes: dict[str, Shape] = {EMBEDDING: (vocabulary, model.hidden_size)}
    for layer in range(model.num_layers):
        for name, shape in _layer(architecture):
            shapes[f"decoder.layers.{layer}.{name}"] = shape
    shapes[FINAL_NORM] = (model.hidden_size,)
    if model.untie_embeddings_and_output_weights:
        shapes[HEAD] = (vocabulary, model.hidden_size)
    return shapes


def _layer(architecture: Architecture) -> Iterator[tuple[str, Shape]]:
    model, experts = architecture.model, len(architecture.experts)
    hidden, ffn, dim = model.hidden_size, model.ffn_hidden_size, kv_channels(model)
    yield QKV_NORM, (hidden,)
    yield QKV, (qkv_width(model), hidden)
    if model.add_qkv_bias:
        yield QKV_BIAS, (qkv_width(model),)
    if model.qk_layernorm:
        yield Q_NORM, (dim,)
        yield K_NORM, (dim,)
    yield PROJ, (hidden, model.num_attention_heads * dim)
    if not experts:
        yield DENSE_NORM, (hidden,)
        yield "mlp.linear_fc1.weight", (2 * ffn, hidden)
        yield "mlp.linear_fc2.weight", (hidden, ffn)
        return
    yield MOE_NORM, (hidden,)
    yield ROUTER, (experts, hidden)
    ffn = expert_width(model)
    for expert in range(experts):
        yield f"mlp.experts.{expert}.linear_fc1.weight", (2 * ffn, hidden)
        yield f"mlp.experts.{expert}.linear_fc2.weight", (hidden, ffn)
    if (shared := model.moe_shared_expert_intermediate_size) is not None:
        yield f"{SHARED}.linear_fc1.weight", (2 * shared, hidden)
        yield f"{SHARED}.linear_fc2.weight", (hidden, shared)
        if model.moe_shared_expert_gate:
            yield SHARED_GATE, (1, hidden)


def group_of(name: str) -> str:
    """What a canonical tensor belongs to: embeddings, attention, norms, ffn or head."""
    if name.startswith("embedding."):
        return "embeddings"
    if name.startswith("output_layer."):
        return "head"
    if "norm" in name:
        return "norms"
    return "attention" if ".self_attention." in name else "ffn"
