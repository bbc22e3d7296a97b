"""The layer specification: which module computes which part of a transformer layer.

With Transformer Engine it is Megatron's own specification with our
router in it; without, Megatron's layers with torch's kernels.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_btx.engine import platform
from megatron_btx.engine.megatron_release import MOE_SPEC_IS_PARTIAL
from megatron_btx.engine.moe.experts import GroupedExperts
from megatron_btx.engine.moe.router import BTXRouter
from megatron_btx.engine.ops.attention import ScaledDotProductAttention
from megatron_btx.engine.ops.norm import RMSNorm
from megatron_btx.recipe.schema import Routing

# One name for a norm, whichever kernels ran: Transformer Engine fuses a norm into the linear layer
# behind it and stores it there. An MoE layer has no such linear layer, so its pre-FFN norm keeps
# the name of its own.
_INPUT_NORM = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_PRE_MLP_NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def block_spec(
    config: TransformerConfig,
    routing: Routing | None = None,
    random_seed: int = 0,
    machine: platform.Platform | None = None,
    vp_stage: int | None = None,
    residual_multiplier: float = 1.0,
) -> ModuleSpec | TransformerBlockSubmodules:
    """This pipeline stage's layers (those of one of its virtual stages), for
    ``GPTModel(transformer_layer_spec=...)``; other arguments as ``layer_spec``'s."""
    machine = machine or platform.detect()
    layer = layer_spec(
        routing,
        random_seed,
        machine,
        qk_layernorm=config.qk_layernorm,
        residual_multiplier=residual_multiplier,
    )
    if machine.layers == "transformer_engine":
        return layer
    # Spelled out for the sake of the final norm: given one layer, Megatron takes its own norm,
    # which refuses sequence parallelism.
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm
    )


def layer_spec(
    routing: Routing | None = None,
    random_seed: int = 0,
    machine: platform.Platform | None = None,
    *,
    qk_layernorm: bool = False,
    residual_multiplier: float = 1.0,
) -> ModuleSpec:
    """One transformer layer: dense without ``routing``, an MoE layer with it.

    Args:
        routing: the recipe's routing function; ``None`` for the dense models.
        random_seed: seeds the routing's noise (``sample_top1``).
        machine: ``None``: this one.
        qk_layernorm: as in the configuration, which Megatron does not ask here.
        residual_multiplier: the recipe's.
    """
    machine = machine or platform.detect()
    add = multiply_and_add(residual_multiplier)
    if machine.layers == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=None if routing is None else 1,
            moe_grouped_gemm=routing is not None,
            qk_layernorm=qk_layernorm,
        )
        if routing is not None:
            moe = spec.submodules.mlp
            parts = moe.keywords["submodules"] if MOE_SPEC_IS_PARTIAL else moe.submodules
            spec.submodules.mlp = _moe(routing, random_seed, parts.experts, parts.shared_experts)
        spec.submodules.self_attn_bda = spec.submodules.mlp_bda = add
        return spec
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    dense: Any = (
        functools.partial(MLP.as_mlp_submodule, submodules=linears)
        if MOE_SPEC_IS_PARTIAL
        else ModuleSpec(module=MLP, submodules=linears)
    )
    shared = ModuleSpec(module=SharedExpertMLP, submodules=linears)
    head_norm = RMSNorm if qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=ScaledDotProductAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=add,
            pre_mlp_layernorm=RMSNorm,
            mlp=dense if routing is None else _moe(routing, random_seed, GroupedExperts, shared),
            mlp_bda=add,
            sharded_state_dict_keys_map=(
                {**_INPUT_NORM, **_PRE_MLP_NORM} if routing is None else _INPUT_NORM
            ),
        ),
    )


def multiply_and_add(multiplier: float) -> Any:
    """Megatron's ``get_bias_dropout_add`` for outputs that are multiplied before they are added to
    the residual stream; of layers without biases."""
    if multiplier == 1:
        return get_bias_dropout_add

    def get(training: bool, fused: bool) -> Any:
        add = get_bias_dropout_add(training, fused)

        def multiplied(x_with_bias: tuple[Any, None], residual: Any, dropout: float) -> Any:
            x, bias = x_with_bias
            return add((x * multiplier, bias), residual, dropout)

        return multiplied

    return get


def _moe(
    routing: Routing, random_seed: int, experts: ModuleSpec | type, shared: ModuleSpec
) -> ModuleSpec:
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=experts,
            shared_experts=shared,  # built where the configuration has one
            router=functools.partial(BTXRouter, routing=routing, random_seed=random_seed),
        ),
    )
