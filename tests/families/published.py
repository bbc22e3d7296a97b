"""``config.json`` files as their makers published them, every key of them; only sizes are cut down.

What is cut is the number of layers, widths, heads, experts and the vocabulary, in proportion where
the proportion matters (wide heads, one key/value head for several queries), and the sliding window,
which is shorter than the test's text. All else stands as it was published.

Phi-3, Granite, GraniteMoE and SmolLM3 were held against copies in public repositories (2026-11-28):
whole files of Phi-3-mini-4k in ThanatosShinji/onnx-tool 00f5f0a, onnx_tool/model_configs.py, of
granite-3.1-1b-a400m-instruct in leok7v/nano-lamma c16de35, models/, and of a Granite of 8B; of
SmolLM3-3B what shapes it (RoPE, its absence, norms, tying, positions) in the tests of
HfConfigExtractor of kkokosa/dotLLM, and all keys but ``bos_token_id`` in other loaders' tests.
"""

from __future__ import annotations

from typing import Any

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "model_type": "llama",
    "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 70,
}  # fmt: skip
_LLAMA3 = _LLAMA | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def _scaling(factor: float) -> dict[str, Any]:
    return {
        "factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    }  # fmt: skip


_MISTRAL = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 70,
}  # fmt: skip
_MIXTRAL = _MISTRAL | {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "model_type": "mixtral",
    "num_experts_per_tok": 2, "num_local_experts": 4, "output_router_logits": False,
    "rope_theta": 1000000.0, "sliding_window": None,
}  # fmt: skip
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
    "intermediate_size": 48, "max_position_embeddings": 131072, "max_window_layers": 2,
    "model_type": "qwen2", "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 70,
}  # fmt: skip
_PHI3 = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "embd_pdrop": 0.0, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
    "intermediate_size": 48, "model_type": "phi3", "num_attention_heads": 4,
    "num_hidden_layers": 2, "pad_token_id": 69, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 70,
}  # fmt: skip
"""``pad_token_id`` is one of the vocabulary's, which is cut down."""
_GRANITE = {
    "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
    "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0,
    "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
    "intermediate_size": 48, "logits_scaling": 8.0, "max_position_embeddings": 4096,
    "mlp_bias": False, "model_type": "granite", "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 70,
}  # fmt: skip
_GRANITE_MOE = {key: value for key, value in _GRANITE.items() if key != "mlp_bias"} | {
    "architectures": ["GraniteMoeForCausalLM"], "attention_dropout": 0.0, "logits_scaling": 6.0,
    "model_type": "granitemoe", "num_experts_per_tok": 2, "num_local_experts": 4,
    "output_router_logits": False, "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.0,
}  # fmt: skip
_QWEN3 = _QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 16,
    "max_position_embeddings": 40960, "model_type": "qwen3", "rope_scaling": None,
    "sliding_window": None, "transformers_version": "4.51.0",
}  # fmt: skip
_SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
    "intermediate_size": 48, "max_position_embeddings": 65536, "max_window_layers": 28,
    "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0], "num_attention_heads": 4, "num_hidden_layers": 4,
    "num_key_value_heads": 1, "pad_token_id": 69, "pretraining_tp": 2, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 70,
}  # fmt: skip
_QWEN3_MOE = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1,
    "eos_token_id": 151645, "mlp_only_layers": [], "moe_intermediate_size": 24,
    "norm_topk_prob": True, "num_experts": 4, "num_experts_per_tok": 2,
    "output_router_logits": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
_QWEN2_MOE = _QWEN2 | {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "decoder_sparse_step": 1,
    "max_position_embeddings": 8192, "moe_intermediate_size": 24, "norm_topk_prob": False,
    "num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": False,
    "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 40, "sliding_window": 32768,
    "transformers_version": "4.39.0.dev0",
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "huggyllama/llama-7b": _LLAMA
    | {
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048,
        "max_sequence_length": 2048, "pad_token_id": 0, "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.28.0.dev0",
    },
    "meta-llama/Llama-2-7b-hf": _LLAMA
    | {
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "bos_token_id": 1, "eos_token_id": 2,
        "max_position_embeddings": 4096, "num_key_value_heads": 4, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
    },
    "meta-llama/Meta-Llama-3-8B": _LLAMA3
    | {
        "eos_token_id": 128001, "max_position_embeddings": 8192, "rope_scaling": None,
        "transformers_version": "4.40.0.dev0",
    },
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA3
    | {
        "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072,
        "mlp_bias": False, "rope_scaling": _scaling(8.0), "transformers_version": "4.42.3",
    },
    "meta-llama/Llama-3.2-1B": _LLAMA3
    | {
        "eos_token_id": 128001, "head_dim": 16, "max_position_embeddings": 131072,
        "mlp_bias": False, "rope_scaling": _scaling(32.0), "tie_word_embeddings": True,
        "transformers_version": "4.45.0.dev0",
    },
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": _LLAMA
    | {
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float32",
        "transformers_version": "4.31.0.dev0",
    },
    "HuggingFaceTB/SmolLM2-135M": _LLAMA
    | {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0,
        "initializer_range": 0.041666666666666664, "is_llama_config": True,
        "max_position_embeddings": 8192, "mlp_bias": False, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
    },
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _LLAMA
    | {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "max_position_embeddings": 8192, "mlp_bias": False, "num_key_value_heads": 4,
        "pad_token_id": 2, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 130000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
        "transformers.js_config": {
            "dtype": "q4", "kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"},
            "use_external_data_format": {"model.onnx": True, "model_fp16.onnx": True},
        },
    },
    "HuggingFaceTB/SmolLM3-3B": _SMOLLM3,
    "tiiuae/Falcon3-7B-Base": {
        key: value for key, value in _LLAMA.items() if key != "pretraining_tp"
    }
    | {
        "activation": "swiglu", "attention_bias": False, "attention_dropout": 0.0,
        "eos_token_id": 11, "head_dim": 16, "max_position_embeddings": 32768, "mlp_bias": False,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000042, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.46.1",
    },
    "01-ai/Yi-6B": _LLAMA
    | {
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096,
        "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 5000000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0",
    },
    "deepseek-ai/deepseek-llm-7b-base": _LLAMA
    | {
        "bos_token_id": 100000, "eos_token_id": 100001, "max_position_embeddings": 4096,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
    },
    "deepseek-ai/deepseek-coder-6.7b-base": _LLAMA
    | {
        "bos_token_id": 32013, "eos_token_id": 32014, "max_position_embeddings": 16384,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    },
    "codellama/CodeLlama-7b-hf": _LLAMA
    | {
        "_name_or_path": None, "bos_token_id": 1, "eos_token_id": 2,
        "max_position_embeddings": 16384, "num_key_value_heads": 4, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 1000000, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.33.0.dev0",
    },
    "mistralai/Mistral-7B-v0.1": _MISTRAL
    | {"rope_theta": 10000.0, "sliding_window": 7, "transformers_version": "4.34.0.dev0"},
    "mistralai/Mistral-7B-v0.3": _MISTRAL
    | {
        "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None,
        "transformers_version": "4.42.0.dev0",
    },
    "mistralai/Mistral-Nemo-Base-2407": _MISTRAL
    | {
        "attention_dropout": 0.0, "head_dim": 16, "max_position_embeddings": 128000,
        "rope_theta": 1000000.0, "sliding_window": None, "transformers_version": "4.43.0.dev0",
    },
    "microsoft/Phi-3-mini-4k-instruct": _PHI3
    | {
        "_name_or_path": "Phi-3-mini-4k-instruct", "bos_token_id": 1, "eos_token_id": 32000,
        "max_position_embeddings": 4096, "num_key_value_heads": 4,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": 7,
        "transformers_version": "4.40.2",
    },
    "microsoft/phi-4": {key: value for key, value in _PHI3.items() if key != "auto_map"}
    | {
        "bos_token_id": 100257, "eos_token_id": 100265, "max_position_embeddings": 16384,
        "num_key_value_heads": 2, "original_max_position_embeddings": 16384,
        "rope_theta": 250000, "sliding_window": None, "transformers_version": "4.47.0",
    },
    "ibm-granite/granite-3.0-2b-base": _GRANITE | {"transformers_version": "4.46.0.dev0"},
    "ibm-granite/granite-3.1-2b-base": _GRANITE
    | {
        "max_position_embeddings": 131072, "rope_theta": 5000000.0,
        "transformers_version": "4.47.0.dev0",
    },
    "ibm-granite/granite-3.2-8b-instruct": _GRANITE
    | {
        "attention_dropout": 0.0, "attention_multiplier": 0.0078125, "logits_scaling": 16.0,
        "max_position_embeddings": 131072, "rope_theta": 10000000.0,
        "transformers_version": "4.49.0",
    },
    "ibm-granite/granite-3.1-1b-a400m-base": _GRANITE_MOE
    | {
        "max_position_embeddings": 131072, "rope_theta": 1500000.0,
        "transformers_version": "4.47.0.dev0",
    },
    "mistralai/Mixtral-8x7B-v0.1": _MIXTRAL
    | {"router_aux_loss_coef": 0.02, "transformers_version": "4.36.0.dev0"},
    "mistralai/Mixtral-8x22B-v0.1": _MIXTRAL
    | {
        "max_position_embeddings": 65536, "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0, "transformers_version": "4.38.0",
    },
    "Qwen/Qwen2-0.5B": _QWEN2 | {"tie_word_embeddings": True},
    "Qwen/Qwen2.5-7B": _QWEN2 | {"use_mrope": False},
    "Qwen/Qwen3-0.6B": _QWEN3 | {"eos_token_id": 151645, "tie_word_embeddings": True},
    "Qwen/Qwen3-8B-Base": _QWEN3 | {"max_position_embeddings": 32768},
    "Qwen/Qwen3-30B-A3B": _QWEN3_MOE,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _QWEN3_MOE
    | {"max_position_embeddings": 262144, "rope_theta": 10000000},
    "Qwen/Qwen1.5-MoE-A2.7B": _QWEN2_MOE,
    "Qwen/Qwen2-57B-A14B": _QWEN2_MOE
    | {
        "max_position_embeddings": 131072, "sliding_window": 65536,
        "transformers_version": "4.40.1",
    },
}  # fmt: skip
"""Name on the Hub -> its ``config.json``."""

UNLIKE: list[tuple[str, dict[str, Any], str]] = [
    ("HuggingFaceTB/SmolLM2-135M", {"rope_interleaved": True}, "rope_interleaved is True"),
    ("tiiuae/Falcon3-7B-Base", {"activation": "gelu"}, "activation is 'gelu'"),
    (
        "Qwen/Qwen3-30B-A3B",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        "the versions of transformers disagree",
    ),
    ("Qwen/Qwen2.5-7B", {"use_mrope": True}, "use_mrope is True"),
    (
        "Qwen/Qwen2.5-7B",  # Qwen2.5-7B-Instruct-1M
        {"dual_chunk_attention_config": {"chunk_size": 262144}},
        "dual_chunk_attention_config",
    ),
    (
        "Qwen/Qwen3-8B-Base",  # as its card says for long texts
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                          "original_max_position_embeddings": 32768}},
        "of type yarn",
    ),
    (
        "microsoft/phi-4",  # as in Phi-3.5-mini
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        "rope_scaling of type longrope; of this family default can be computed",
    ),
    ("microsoft/phi-4", {"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75"),
    ("microsoft/phi-4", {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "names modeling_x"),
    ("HuggingFaceTB/SmolLM3-3B", {"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0] for 4"),
    (
        "HuggingFaceTB/SmolLM3-3B",
        {"use_sliding_window": True, "sliding_window": 7},
        "in which layers?",
    ),
    ("ibm-granite/granite-3.0-2b-base", {"mlp_bias": True}, "mlp_bias is True"),
    ("ibm-granite/granite-3.0-2b-base", {"residual_multiplier": 0}, "residual_multiplier: is 0"),
    ("meta-llama/Llama-2-7b-hf", {"attention_bias": True}, "attention_bias is True"),
    (
        "meta-llama/Llama-2-7b-hf",  # transformers 4 reads the one, 5 the other
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "rope_theta is 10000.0 and 500000.0",
    ),
    (
        "meta-llama/Llama-3.1-8B-Instruct",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}},
        "and rope_parameters is",
    ),
    ("Qwen/Qwen3-8B-Base", {"is_causal": False}, "is_causal is False"),
    ("01-ai/Yi-6B", {"auto_map": {"AutoModelForCausalLM": "modeling_yi.Yi"}}, "auto_map"),
]  # fmt: skip
"""A name, what a variant of it has, and what is said of it."""
