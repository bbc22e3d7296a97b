"""Published ``config.json`` files with changed keys: whatever is accepted means to us what it means
to ``transformers``. Seeded, and compared as facts, without weights."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from megatron_btx.errors import UserError
from megatron_btx.families.hf import FAMILIES
from megatron_btx.families.hf_routing import HFRouting
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.count import expert_width, kv_channels, query_groups, resolved, windows
from tests.families.published import PUBLISHED

transformers = pytest.importorskip("transformers")

GONE = "gone"
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CHANGES: dict[str, list[Any]] = {
    "rope_theta": [GONE, 1e4, 5e5],
    "rope_scaling": [
        GONE,
        None,
        _LLAMA3,
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "default", "rope_theta": 7e4},
        {"rope_type": "linear", "type": "dynamic", "factor": 2.0},
    ],
    "rope_parameters": [
        None,
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_theta": 2e5},
        _LLAMA3 | {"rope_theta": 5e5},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ],
    "partial_rotary_factor": [0.5, None],
    "head_dim": [GONE, None, 8, 16],
    "num_key_value_heads": [GONE, None, 1, 4],
    "sliding_window": [GONE, None, 0, 1, 7],
    "use_sliding_window": [GONE, True, False],
    "max_window_layers": [GONE, 0, 1, 5],
    "layer_types": [
        None,
        ["full_attention"] * 2,
        ["sliding_attention"] * 2,
        ["full_attention", "sliding_attention"],
        ["chunked_attention"] * 2,
    ],
    "tie_word_embeddings": [GONE, True, False],
    "attention_bias": [GONE, True],
    "qkv_bias": [GONE, False],
    "mlp_bias": [GONE, True],
    "hidden_act": [GONE, "gelu", "swish"],
    "router_jitter_noise": [0.1],
    "norm_topk_prob": [GONE, True, False],
    "num_experts_per_tok": [1, 2, 4],
    "num_local_experts": [4, 8],
    "decoder_sparse_step": [GONE, 1, 2],
    "mlp_only_layers": [GONE, None, [], [1]],
    "moe_intermediate_size": [24, 32],
    "shared_expert_intermediate_size": [GONE, 24],
    "rms_norm_eps": [GONE, 1e-6],
    "attention_multiplier": [GONE, 1, 0.25],
    "residual_multiplier": [GONE, 0.5],
    "no_rope_layers": [GONE, None, [0, 1], [1, 1, 1, 1], [0, 1, 1, 0, 1]],
    "no_rope_layer_interval": [GONE, 1, 2],
    "logits_scaling": [GONE, 8],
    "is_causal": [True, False],
    "model_type": [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi3",
        "smollm3",
        "granite",
        "granitemoe",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
    ],
}


def changed(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A configuration and what was changed in it."""
    r = random.Random(seed)
    config = copy.deepcopy(PUBLISHED[r.choice(sorted(PUBLISHED))])
    keys = r.sample(sorted(CHANGES), r.choice((1, 2, 2, 3)))
    changes = {key: copy.deepcopy(r.choice(CHANGES[key])) for key in keys}
    config |= changes
    return {key: value for key, value in config.items() if value != GONE}, changes


def ours(found: Architecture) -> dict[str, Any]:
    model, experts = found.model, found.experts
    scaling = ("default", None)
    if model.rope_scaling:
        scaling = ("llama3", model.rope_scaling_factor)
    elif model.seq_len_interpolation_factor is not None:
        scaling = ("linear", model.seq_len_interpolation_factor)
    gates = HFRouting.of(found) if experts else None
    layers = model.num_layers
    return {
        "layers": model.num_layers,
        "head": kv_channels(model),
        "groups": query_groups(model),
        "base": model.rotary_base,
        "positions": tuple(not skipped for skipped in model.no_rope_freq or (0,) * layers),
        "multipliers": (
            resolved(model).softmax_scale,
            model.embedding_multiplier,
            model.residual_multiplier,
            model.logits_scaling,
        ),
        "scaling": scaling,
        "rotated": 1.0,
        "epsilon": model.layernorm_epsilon,
        "activation": "silu",
        "causal": True,
        "windows": windows(model),
        "tied": not model.untie_embeddings_and_output_weights,
        "biases": (model.add_qkv_bias, False),
        "width": expert_width(model) if experts else model.ffn_hidden_size,
        "shared": model.moe_shared_expert_intermediate_size,
        "experts": len(experts),
        "gates": gates and (gates.k, gates.normalised),
        "everywhere": True,
    }


def theirs(config: Any) -> dict[str, Any]:
    kind, layers, rope = config.model_type, config.num_hidden_layers, config.rope_parameters
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) if kind[:4] in ("qwen", "smol") else None
    types = (
        types
        or ["full_attention" if kind in ("llama", "granite", "granitemoe") else "sliding_attention"]
        * layers
    )
    moe = kind in ("mixtral", "granitemoe", "qwen2_moe", "qwen3_moe")
    local = kind in ("mixtral", "granitemoe")
    count = getattr(config, "num_local_experts" if local else "num_experts", 0) if moe else 0
    gates = None
    if moe:
        k = config.num_experts_per_tok
        gates = (k, local or config.norm_topk_prob or k == count)
    qwen_moe = moe and not local
    sparse = qwen_moe and (config.decoder_sparse_step, config.mlp_only_layers or [])
    bias = {"qwen2": True, "qwen2_moe": getattr(config, "qkv_bias", True)}
    own_bias = getattr(config, "attention_bias", False)
    head = getattr(config, "head_dim", None)
    scaled = rope["rope_type"] != "default"
    width = head or config.hidden_size // config.num_attention_heads
    granite = kind.startswith("granite")
    rotated = config.no_rope_layers if kind == "smollm3" else [1] * layers
    return {
        "layers": layers,
        "head": width,
        "groups": config.num_key_value_heads or config.num_attention_heads,
        "base": rope["rope_theta"],
        "positions": tuple(map(bool, rotated[:layers])),
        "multipliers": (
            getattr(config, "attention_multiplier", 1.0) if granite else width**-0.5,
            *(getattr(config, name) if granite else 1.0 for name in MULTIPLIERS),
        ),
        "scaling": (rope["rope_type"], rope["factor"] if scaled else None),
        "rotated": rope.get("partial_rotary_factor") or 1.0,
        "epsilon": config.rms_norm_eps,
        "activation": {"swish": "silu"}.get(config.hidden_act, config.hidden_act),
        "causal": getattr(config, "is_causal", True),
        "windows": tuple(window if one == "sliding_attention" else None for one in types),
        "tied": config.tie_word_embeddings,
        "biases": (bias.get(kind, own_bias), getattr(config, "mlp_bias", False)),
        "width": config.moe_intermediate_size if qwen_moe else config.intermediate_size,
        "shared": config.shared_expert_intermediate_size if kind == "qwen2_moe" else None,
        "experts": count,
        "gates": gates,
        "everywhere": sparse in (False, (1, [])),
    }


def understood(config: dict[str, Any]) -> Any:
    """The configuration of ``transformers``. Release 5 takes null for the number of heads too, as
    its code for Mistral and Mixtral says, but its check of types comes first and refuses it."""
    if config["model_type"] in ("mistral", "mixtral"):
        heads = {"num_key_value_heads": config["num_attention_heads"]}
        config = {k: v if v is not None else heads.get(k) for k, v in config.items()}
    return transformers.AutoConfig.for_model(**config)


@pytest.mark.parametrize("part", range(4))
def test_what_is_accepted_means_what_transformers_takes_it_for(part: int) -> None:
    accepted = 0
    for seed in range(part * 100, (part + 1) * 100):
        config, changes = changed(seed)
        try:
            found = FAMILIES[config["model_type"]].read_config(copy.deepcopy(config), "config.json")
        except UserError:
            continue
        accepted += 1
        assert ours(found) == theirs(understood(config)), (seed, changes)
    assert accepted > 20


NO_WINDOW = {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}
PHI3 = "microsoft/Phi-3-mini-4k-instruct"
READ = [
    *((name, NO_WINDOW) for name in ("Qwen/Qwen2-0.5B", "Qwen/Qwen3-0.6B", "Qwen/Qwen2-57B-A14B")),
    ("HuggingFaceTB/SmolLM3-3B", NO_WINDOW | {"no_rope_layers": [0, 1, 1, 1]}),
    ("Qwen/Qwen3-30B-A3B", NO_WINDOW | {"max_window_layers": 1}),
    ("Qwen/Qwen2-57B-A14B", {"use_sliding_window": False, "sliding_window": 0}),
    *(
        (name, {"num_key_value_heads": None})
        for name in ("mistralai/Mistral-7B-v0.1", "mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-0.6B")
    ),
    *(
        (name, {"head_dim": 8})
        for name in ("ibm-granite/granite-3.1-2b-base", "HuggingFaceTB/SmolLM3-3B", PHI3)
    ),
    ("ibm-granite/granite-3.1-1b-a400m-base", {"head_dim": 8}),
    ("mistralai/Mixtral-8x7B-v0.1", {"router_jitter_noise": 0.1}),
    ("huggyllama/llama-7b", {"hidden_act": "swish"}),
    (PHI3, {"auto_map": {"AutoConfig": f"{PHI3}--configuration_phi3.Phi3Config"}}),
]


@pytest.mark.parametrize(("name", "changes"), READ)
def test_what_is_written_otherwise_is_read_as_it_is_meant(
    name: str, changes: dict[str, Any]
) -> None:
    config = copy.deepcopy(PUBLISHED[name]) | changes
    found = FAMILIES[config["model_type"]].read_config(copy.deepcopy(config), "config.json")
    assert ours(found) == theirs(understood(config))


REFUSED = [
    *(
        (name, NO_WINDOW | {"layer_types": ["sliding_attention"] * 2}, "there is no sliding_window")
        for name in ("Qwen/Qwen2-0.5B", "Qwen/Qwen3-0.6B", "Qwen/Qwen2-57B-A14B")
    ),
    *(
        (name, {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0},
         "sliding_window is 0")
        for name in ("Qwen/Qwen2-0.5B", "Qwen/Qwen3-30B-A3B")
    ),
    ("mistralai/Mistral-7B-v0.1", {"sliding_window": 0}, "sliding_window is 0"),
    ("mistralai/Mistral-7B-v0.1", {"num_key_value_heads": GONE}, "num_key_value_heads is missing"),
    ("Qwen/Qwen3-30B-A3B", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
    ("ibm-granite/granite-3.1-2b-base", {"head_dim": 16}, "head_dim is 16, for 4 heads"),
    (PHI3, {"auto_map": {"AutoConfig": "a/b--own.Phi3Config"}}, "remove auto_map from a copy"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "words"), REFUSED)
def test_what_says_nothing_that_can_be_computed_is_refused(
    name: str, changes: dict[str, Any], words: str
) -> None:
    config = copy.deepcopy(PUBLISHED[name]) | changes
    config = {key: value for key, value in config.items() if value != GONE}
    with pytest.raises(UserError, match=words):
        FAMILIES[config["model_type"]].read_config(config, "config.json")
