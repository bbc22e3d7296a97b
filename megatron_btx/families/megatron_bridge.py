"""``run_config.yaml``: what NVIDIA's Megatron-Bridge asks of a directory that it shall export or
train on. The inverse of reading one is weights/megatron_lm_args.py."""

from __future__ import annotations

from typing import Any

import yaml

from megatron_btx.errors import UserError
from megatron_btx.families.hf_routing import HFRouting
from megatron_btx.families.write_megatron_lm_args import refuse_multipliers
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.count import expert_width, kv_channels, query_groups

RUN_CONFIG = "run_config.yaml"

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"


def run_config(architecture: Architecture, precision: str) -> bytes | None:
    """The file's content, for a directory that Megatron-Bridge 0.6 reads.

    Its ``GPTModelProvider`` is a ``TransformerConfig``, so the words are Megatron's; what is not
    said is at the default of its class. The vocabulary is not padded there: the rows that pad ours
    are not loaded.

    Args:
        architecture: the model.
        precision: of the weights: ``fp32``, ``bf16`` or ``fp16``.

    Returns:
        ``None`` where Megatron's own layers or router do not compute the model: no file is better
        than one that says another model.
    """
    try:
        model = _model(architecture) | (_experts(architecture) if architecture.experts else {})
    except UserError:
        return None
    content = {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "model": {
            "_target_": _PROVIDER,
            **model,
            "bf16": precision == "bf16",
            "fp16": precision == "fp16",
            "params_dtype": _named(f"torch.{_DTYPES[precision]}"),
            "autocast_dtype": _named(f"torch.{_DTYPES[precision]}"),
        },
        "checkpoint": {
            "_target_": "megatron.bridge.training.config.CheckpointConfig",
            "ckpt_format": "torch_dist",
            "save_optim": False,
            "save_rng": False,
        },
    }
    text: str = yaml.safe_dump(content, sort_keys=True)
    return text.encode()


def _named(target: str) -> dict[str, Any]:
    """Something that Python finds by its name, as their YAML says it."""
    return {"_target_": target, "_call_": False}


def _model(architecture: Architecture) -> dict[str, Any]:
    model = architecture.model
    refuse_multipliers(model)
    freq = model.window_attn_skip_freq
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": query_groups(model),
        "kv_channels": kv_channels(model),
        "seq_length": model.max_position_embeddings or model.seq_length,
        "vocab_size": architecture.vocab_size,
        "should_pad_vocab": False,
        "make_vocab_size_divisible_by": 1,
        "share_embeddings_and_output_weights": not model.untie_embeddings_and_output_weights,
        "position_embedding_type": "rope",
        "rotary_base": model.rotary_base,
        "rope_scaling": model.rope_scaling,
        "rope_scaling_factor": model.rope_scaling_factor,
        "seq_len_interpolation_factor": model.seq_len_interpolation_factor,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.layernorm_epsilon,
        "init_method_std": model.init_method_std,
        "gated_linear_unit": True,
        "activation_func": _named("torch.nn.functional.silu"),
        "add_bias_linear": False,
        "add_qkv_bias": model.add_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        "softmax_scale": model.softmax_scale,
        "no_rope_freq": model.no_rope_freq and list(model.no_rope_freq),
        "window_size": model.window_size and list(model.window_size),
        "window_attn_skip_freq": freq and list(freq),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        # It compares these with its own before it looks for the state of an optimizer.
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }


def _experts(architecture: Architecture) -> dict[str, Any]:
    model, gates = architecture.model, HFRouting.of(architecture)
    if gates.k == 1 and gates.normalised:
        raise UserError("routing", "routes to one expert with weight 1; Megatron's router does not")
    return {
        "num_moe_experts": len(architecture.experts),
        "moe_ffn_hidden_size": expert_width(model),
        "moe_router_topk": gates.k,
        "moe_router_pre_softmax": not gates.normalised,
        "moe_router_score_function": "softmax",
        "moe_router_dtype": "fp32",
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": model.moe_shared_expert_gate,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
    }
