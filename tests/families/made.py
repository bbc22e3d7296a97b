"""Tiny models of every family, made by ``transformers``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

SHAPE = {
    "vocab_size": 70,  # padded to 128
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
THETA = {"rope_type": "default", "rope_theta": 5e5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {"max_position_embeddings": 131072, "head_dim": 16}
MOE = {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
WINDOW = {"use_sliding_window": True, "sliding_window": 7}
MULTIPLIED = {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama, one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama, linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama 3.1": ("Llama", LONG | {"rope_parameters": LLAMA3}),
    "llama 3.2, tied": (
        "Llama",
        LONG | {"rope_parameters": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True},
    ),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral, no window": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, some windows": ("Qwen2", WINDOW | {"max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi3": ("Phi3", {"sliding_window": 7, "pad_token_id": None}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 1], "pad_token_id": None}),
    "granite": ("Granite", MULTIPLIED | {"tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "head_dim": 8}),
    "mixtral, window": ("Mixtral", {"num_local_experts": 4, "sliding_window": 7}),
    "granite moe": ("GraniteMoe", MULTIPLIED | {"num_local_experts": 4}),
    "qwen2 moe": (
        "Qwen2Moe",
        MOE | {"shared_expert_intermediate_size": 40, "norm_topk_prob": False},
    ),
    "qwen2 moe, no bias": (
        "Qwen2Moe",
        MOE
        | WINDOW
        | {
            "shared_expert_intermediate_size": 16,
            "qkv_bias": False,
            "norm_topk_prob": True,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
    "qwen3 moe": ("Qwen3Moe", MOE | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen3 moe, not normalised": (
        "Qwen3Moe",
        MOE | WINDOW | {"head_dim": 8, "norm_topk_prob": False, "num_experts_per_tok": 1},
    ),
}


def make(name: str, directory: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """The model of that name with random weights, saved to ``directory``."""
    import transformers

    family, own = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        # A configuration keeps the dictionaries that it is given, and some write into them.
        **copy.deepcopy(SHAPE | {"rope_parameters": THETA} | own | more)
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # norms too: ones would hide a swap
            parameter.normal_(0, 0.15)
            if "norm" in key:
                parameter.add_(1)
    model.to(dtype).eval().save_pretrained(directory)
    return model
