"""The fields of Megatron's own dataclasses, read from its source without importing it (or torch).

``megatron:`` blocks of a recipe are handed to these classes unchanged; a login node that plans a
run checks them all the same.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from difflib import get_close_matches
from pathlib import Path
from typing import Any

SOURCES = {
    "transformer": (
        ("model_parallel_config.py", "ModelParallelConfig"),
        ("transformer/transformer_config.py", "TransformerConfig"),
    ),
    "ddp": (("distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig"),),
    "optimizer": (("optimizer/optimizer_config.py", "OptimizerConfig"),),
}
"""Block of ``megatron:`` -> file under megatron/core and class, bases first."""

OWNED = {
    "transformer": {
        **{
            name: f"model.{name}"
            for name in (
                "num_layers",
                "hidden_size",
                "ffn_hidden_size",
                "num_attention_heads",
                "num_query_groups",
                "kv_channels",
                "layernorm_epsilon",
                "init_method_std",
                "add_qkv_bias",
                "qk_layernorm",
                "window_size",
                "window_attn_skip_freq",
            )
        },
        "moe_ffn_hidden_size": "model.ffn_hidden_size",
        **{
            name: f"layout.{name}"
            for name in (
                "tensor_model_parallel_size",
                "pipeline_model_parallel_size",
                "context_parallel_size",
                "expert_model_parallel_size",
                "expert_tensor_parallel_size",
                "sequence_parallel",
            )
        },
        **{
            name: f"routing.{name}"
            for name in (
                "moe_router_topk",
                "moe_router_pre_softmax",
                "moe_router_load_balancing_type",
                "moe_aux_loss_coeff",
                "moe_z_loss_coeff",
                "moe_expert_capacity_factor",
            )
        },
        "num_moe_experts": "experts (one for each, and mix.include_seed)",
        "moe_router_score_function": "routing.type",
        "moe_token_drop_policy": "routing.type",
        "bf16": "precision",
        "fp16": "precision",
        "params_dtype": "precision",
        "pipeline_dtype": "precision",
        "autocast_dtype": "precision",
        "enable_autocast": "precision",
    },
    "ddp": {"use_distributed_optimizer": "use_distributed_optimizer"},
    "optimizer": {
        **{
            name: name
            for name in (
                "lr",
                "min_lr",
                "weight_decay",
                "adam_beta1",
                "adam_beta2",
                "adam_eps",
                "clip_grad",
                "use_distributed_optimizer",
            )
        },
        "bf16": "precision",
        "fp16": "precision",
        "params_dtype": "precision",
    },
}
"""Keys that the recipe sets itself, and where."""

_FIXED = {
    **dict.fromkeys(
        (
            "normalization",
            "layernorm_zero_centered_gamma",
            "add_bias_linear",
            "gated_linear_unit",
            "glu_linear_offset",
            "attention_output_gate",
            "multi_latent_attention",
            "experimental_attention_variant",
            "rotary_interleaved",
            "no_rope_freq",
            "softmax_type",
            "apply_residual_connection_post_layernorm",
            "mtp_num_layers",
            "is_hybrid_model",
            "heterogeneous_block_specs",
            "softmax_scale",
            "qk_l2_norm",
            "activation_func_clamp_value",
            "moe_apply_probs_on_input",
        ),
        "the mix knows Llama's layers, and this makes others of them",
    ),
    **dict.fromkeys(
        (
            "moe_layer_freq",
            "moe_shared_expert_intermediate_size",
            "moe_shared_expert_gate",
            "moe_latent_size",
            "moe_router_enable_expert_bias",
            "moe_router_topk_scaling_factor",
            "moe_router_num_groups",
            "moe_router_group_topk",
        ),
        "it makes an MoE that is not Branch-Train-MiX's",
    ),
    **dict.fromkeys(
        (
            "virtual_pipeline_model_parallel_size",
            "pipeline_model_parallel_layout",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
        ),
        "layers are split evenly over the pipeline's stages",
    ),
    "perform_initialization": (
        "all weights come from a plan, and without it Megatron's gradient norm takes the shards of "
        "tensor parallelism for replicas"
    ),
    "calculate_per_token_loss": "every micro-batch has as many tokens as any other",
    "optimizer": "the paper's optimizer is AdamW, and checkpoints hold its two moments",
}
"""Keys that would make another model or optimizer than the project's, with the reason."""


@functools.cache
def fields(block: str) -> dict[str, ast.expr] | None:
    """Field -> annotation of the dataclass behind a block; ``None``: Megatron is not installed."""
    core = _core_directory()
    if core is None:
        return None
    found: dict[str, ast.expr] = {}
    for file, name in SOURCES[block]:
        tree = ast.parse((core / file).read_text(encoding="utf-8"))
        for item in tree.body:
            if isinstance(item, ast.ClassDef) and item.name == name:
                found |= {
                    line.target.id: line.annotation
                    for line in item.body
                    if isinstance(line, ast.AnnAssign)
                    and isinstance(line.target, ast.Name)
                    and not line.target.id.startswith("_")
                }
    return found


def problem(block: str, key: str, value: Any) -> tuple[str, str] | None:
    """What is wrong with ``megatron.<block>.<key>: value`` and the fix; ``None``: nothing."""
    known = fields(block)
    class_name = SOURCES[block][-1][1]
    if known is None:
        return (
            "cannot be checked: megatron-core is not installed",
            "pip install megatron-core==0.16.1",
        )
    if key in OWNED[block]:
        home = OWNED[block][key]
        return "is the recipe's to set", f"set `{home}` instead"
    if key not in known:
        near = get_close_matches(key, known, n=1)
        fix = (
            f"did you mean `{near[0]}`?" if near else f"see {class_name} in {SOURCES[block][-1][0]}"
        )
        return f"is not a field of Megatron's {class_name}", fix
    if key in _FIXED:
        return "cannot be set: " + _FIXED[key], "remove it"
    text = ast.unparse(known[key])
    if "Callable" in text or "dtype" in text:
        return f"is a {text}, which YAML cannot express", "remove it"
    if not _fits(known[key], value):
        return f"is {value!r}, not {text}", f"give a value of type {text}"
    return None


def _fits(annotation: ast.expr, value: Any) -> bool:
    """Whether a YAML value is of the annotated type; types unknown here are left to Megatron."""
    if isinstance(annotation, ast.Constant):
        return value is None if annotation.value is None else True
    if isinstance(annotation, ast.Name):
        if annotation.id == "float":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        kinds = {"int": int, "bool": bool, "str": str}
        if annotation.id in kinds:
            return isinstance(value, kinds[annotation.id]) and (
                annotation.id == "bool" or not isinstance(value, bool)
            )
        return True
    if isinstance(annotation, ast.BinOp):
        return _fits(annotation.left, value) or _fits(annotation.right, value)
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        inner = annotation.slice
        parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        match annotation.value.id:
            case "Optional":
                return value is None or _fits(inner, value)
            case "Union":
                return any(_fits(part, value) for part in parts)
            case "Literal":
                return value in [p.value for p in parts if isinstance(p, ast.Constant)]
            case "List" | "list" | "Tuple" | "tuple":
                return isinstance(value, list)
    return True


def _core_directory() -> Path | None:
    spec = importlib.util.find_spec("megatron")
    if spec is None:
        return None
    for place in spec.submodule_search_locations or ():
        if (Path(place) / "core" / SOURCES["transformer"][0][0]).is_file():
            return Path(place) / "core"
    return None
