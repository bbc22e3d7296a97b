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


def _under(block: str, names: str) -> dict[str, str]:
    """Each of the names to its dotted key in a block of the recipe."""
    return {name: f"{block}.{name}" for name in names.split()}


OWNED = {
    "transformer": {
        **_under(
            "model",
            """
            num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups
            kv_channels layernorm_epsilon init_method_std add_qkv_bias qk_layernorm
            softmax_scale no_rope_freq window_size window_attn_skip_freq
            """,
        ),
        "moe_ffn_hidden_size": "model.ffn_hidden_size",
        **_under(
            "layout",
            """
            tensor_model_parallel_size pipeline_model_parallel_size
            virtual_pipeline_model_parallel_size context_parallel_size
            expert_model_parallel_size expert_tensor_parallel_size sequence_parallel
            """,
        ),
        **_under(
            "routing",
            """
            moe_router_topk moe_router_pre_softmax moe_router_load_balancing_type
            moe_aux_loss_coeff moe_z_loss_coeff moe_expert_capacity_factor
            """,
        ),
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
            "softmax_type",
            "apply_residual_connection_post_layernorm",
            "mtp_num_layers",
            "is_hybrid_model",
            "heterogeneous_block_specs",
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
            "pipeline_model_parallel_layout",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
        ),
        "layers are split evenly over the pipeline's stages",
    ),
    "microbatch_group_size_per_vp_stage": "virtual stages take micro-batches in groups of PP",
    "perform_initialization": (
        "all weights come from a plan, and without it Megatron's gradient norm takes the shards of "
        "tensor parallelism for replicas"
    ),
    "calculate_per_token_loss": "every micro-batch has as many tokens as any other",
    "optimizer": "the paper's optimizer is AdamW, and checkpoints hold its two moments",
}
"""Keys that would make another model or optimizer than the project's, with the reason."""

UNTRIED: dict[str, tuple[str, ...]] = {
    "transformer": (
        "cpu_offloading_retain_pinned_cpu_buffers", "moe_grad_scale_func", "mtp_grad_scale_func",
        "overlap_dispatch_backward_with_experts_wgrad", "tensor_parallel_num_weight_shards",
        "gtp_weight_remat_size", "expert_tensor_parallel_num_weight_shards",
        "expert_gtp_weight_remat_size", "mtp_use_repeated_layer", "mtp_detach_heads",
        "mtp_hybrid_override_pattern", "experimental_attention_variant_loss_scale_func",
        "dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset", "dsa_kernel_backend",
        "dsa_indexer_rope_interleaved", "dsa_indexer_rotate_activation",
        "dsa_indexer_scoring_relu", "dsa_indexer_k_norm_epsilon", "dsa_indexer_k_norm_fp32",
        "use_mup", "mup_width_mult", "mup_base_hidden_size", "mup_embedding_mult",
        "mup_output_mult", "mup_base_head_dim", "mup_attn_scale_power", "fused_residual_rmsnorm",
        "use_transformer_engine_op_fuser", "fp8_output_proj", "high_priority_a2a_comm_stream",
        "use_grouped_gemm_for_shared_expert", "moe_shared_expert_glu_interleave_size",
        "moe_router_quantile_balancing_ema", "moe_router_force_biased",
        "use_grouped_gemm_for_dense_mlp", "moe_single_grouped_weight", "moe_single_grouped_bias",
        "moe_permute_fusion_into_hybridep", "moe_hybridep_pad_uneven_dispatch_inputs",
        "moe_pad_experts_for_cuda_graph_inference", "moe_flex_dispatcher_num_sms",
        "moe_hybridep_num_blocks_permute", "moe_hybridep_num_blocks_unpermute",
        "moe_hybridep_num_sms_preprocessing", "moe_ncclep_static_shape", "moe_ncclep_zero_copy",
        "moe_mlp_glu_interleave_size", "moe_expert_rank_capacity_factor", "cuda_graph_modules",
        "inference_cuda_graph_scope", "nccl_all_reduce_for_prefill",
        "inference_disable_triton_nvls_kernels", "inference_grouped_gemm_backend",
        "inference_moe_disable_fused_quant_kernels", "inference_moe_token_dispatcher_type",
        "mamba_training_ssm_states_dtype", "mlp_chunks_for_training",
        "delay_offload_until_cuda_graph", "delta_offload_bytes_across_pp_ranks",
        "activation_offload_fraction", "moe_paged_stash", "moe_paged_stash_page_size",
        "moe_paged_stash_buffer_size_factor_cuda", "moe_paged_stash_buffer_size_factor_cpu",
        "fine_grained_offloading_max_inflight_offloads", "flash_attention_version",
    ),
    "ddp": (
        "num_buckets", "param_name_patterns_for_fp32_local_accumulation", "fp4_param_gather",
        "fsdp_db_use_persist_buf_on_alloc_fail", "fsdp_all_gather_in_start_param_sync",
        "megatron_fsdp_main_params_dtype", "megatron_fsdp_main_grads_dtype",
        "megatron_fsdp_grad_comm_dtype", "megatron_fsdp_use_decoupled_grad",
        "megatron_fsdp_cuda_graph_mode", "megatron_fsdp_enable_fine_grained_param_gather",
        "megatron_fsdp_max_pool_double_buffer",
    ),
    "optimizer": (
        "muon_nesterov", "muon_coefficient_type", "muon_scalar_optimizer", "lion_beta1",
        "lion_beta2", "soap_shampoo_beta", "soap_precondition_frequency", "soap_use_kl_shampoo",
        "adaptive_muon_moment2_method", "adaptive_muon_beta2", "adaptive_muon_eps",
        "use_layer_wise_distributed_optimizer", "grad_norm_skip_threshold",
        "optimizer_cuda_graph",
    ),
}  # fmt: skip
"""All keys that Megatron-Core 0.17 to 0.19 added. Some make another model (``use_mup``), some would
not be followed, none has been seen to train as it should here: a key leaves this table with a test.
"""


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
            "pip install -c constraints.txt megatron-core",
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
    if key in UNTRIED[block]:
        return "came after Megatron-Core 0.16 and has not been tried here", "remove it"
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
