"""What Megatron's configuration says beside our router: the fields that a routing function needs,
and the options that :class:`~megatron_btx.engine.moe.router.BTXRouter` follows. All others are
refused before a layer is built, for Megatron's router would follow them and ours would not."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_btx.engine import platform
from megatron_btx.engine.unsupported_options import Supported, refuse_unfollowed
from megatron_btx.errors import UserError, UserErrors, collect_errors
from megatron_btx.recipe.schema import Routing


def transformer_fields(routing: Routing, num_experts: int) -> dict[str, Any]:
    """The fields of ``TransformerConfig`` that a routing function needs, by name.

    Args:
        routing: the recipe's.
        num_experts: N, of the whole model.

    Raises:
        UserError: ``topk`` with a k that is no top-k of N experts.
    """
    k = {"topk": routing.moe_router_topk, "soft": num_experts}.get(routing.type, 1)
    least = 1 if routing.moe_router_pre_softmax else 2
    if routing.type == "topk" and not least <= k <= num_experts:
        raise UserError(
            "routing.moe_router_topk",
            f"{k} of {num_experts} experts"
            + (
                ": SoftMax(TopK) of one logit is always 1 and teaches the router nothing" * (k == 1)
            ),
            f"choose {least} to {num_experts}, or `type: switch` or `sample_top1` for one expert "
            "a token",
        )
    # With a capacity factor the dispatcher counts the routed tokens instead of expecting k of
    # each. Switch drops some; Sample Top-1 runs all experts in a soft first layer. Megatron never
    # drops by it: this router does.
    counted = {"switch": routing.moe_expert_capacity_factor, "sample_top1": float(num_experts)}
    return {
        "num_moe_experts": num_experts,
        "moe_router_topk": k,
        # Megatron demands it of one expert a token; our router reads the recipe.
        "moe_router_pre_softmax": k == 1 or routing.moe_router_pre_softmax,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": routing.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": routing.moe_aux_loss_coeff,
        "moe_z_loss_coeff": routing.moe_z_loss_coeff,
        "moe_expert_capacity_factor": counted.get(routing.type),
    }


ROUTER_OPTIONS: Supported = {
    "moe_router_dtype": ("fp32", "fp64"),
    "moe_router_load_balancing_type": ("none", "aux_loss", "seq_aux_loss"),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (None,),
    "moe_router_num_groups": (None,),
    "moe_router_group_topk": (None,),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_force_load_balancing": (False,),
    "moe_router_force_biased": (None,),
    "moe_router_quantile_balancing_ema": (0.0,),
    "moe_expert_rank_capacity_factor": (None,),
    "moe_router_fusion": (False,),
    "moe_enable_routing_replay": (False,),
    "moe_pad_expert_input_to_capacity": (False,),
    "moe_token_dispatcher_type": ("alltoall", "allgather"),
}
"""Of Megatron's router and its dispatchers."""

WITH_TRANSFORMER_ENGINE: Supported = {
    "moe_router_force_load_balancing": (False, True),
    "moe_router_fusion": (False, True),
    "moe_token_dispatcher_type": ("alltoall", "allgather", "flex"),
}
"""Beside Transformer Engine's layers: its fused top-k, DeepEP or HybridEP, random routes for
benchmarks. Not run: they need GPUs."""


def check_config(
    config: TransformerConfig, routing: Routing, machine: platform.Platform | None = None
) -> None:
    """That the router does what the configuration asks for.

    Args:
        config: the model's.
        routing: the recipe's.
        machine: ``None``: this one.

    Raises:
        UserErrors: all that it does not.
    """
    wrong: list[UserError] = []
    supported, who = ROUTER_OPTIONS, "BTXRouter without Transformer Engine"
    if (machine or platform.detect()).layers == "transformer_engine":
        supported, who = {**ROUTER_OPTIONS, **WITH_TRANSFORMER_ENGINE}, "BTXRouter"
    with collect_errors(wrong):
        refuse_unfollowed(vars(config), supported, who)
    if config.moe_router_fusion and routing.type != "topk":
        what = f"fuses Megatron's top-k, and routing type is {routing.type!r}"
        wrong.append(UserError("megatron.transformer.moe_router_fusion", what, "remove it"))
    fields = transformer_fields(routing, config.num_moe_experts)
    wrong += [
        UserError(
            f"megatron.transformer.{name}",
            f"{getattr(config, name)!r} does not go with routing type {routing.type!r}",
            f"use {fields[name]!r}: build TransformerConfig with transformer_fields()",
        )
        for name in ("moe_router_topk", "moe_expert_capacity_factor")
        if getattr(config, name) != fields[name]
    ]
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        wrong.append(
            UserError(
                "layout.sequence_parallel",
                "experts under tensor parallelism need it: else every rank routes the same tokens",
                "set sequence_parallel: true",
            )
        )
    if wrong:
        raise UserErrors(wrong)
