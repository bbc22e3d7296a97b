"""Megatron's GPTModel from an architecture, a layout and a precision."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import silu

from megatron_btx.engine import platform
from megatron_btx.engine.freezing import canonical_names, freeze
from megatron_btx.engine.megatron_release import DDP_TAKES_LAYOUT
from megatron_btx.engine.moe.router_config import check_config, transformer_fields
from megatron_btx.engine.spec import block_spec
from megatron_btx.engine.unsupported_options import TORCH_LAYERS, megatron_errors, refuse_unfollowed
from megatron_btx.errors import UserError
from megatron_btx.recipe import check_layout, count
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Layout, MegatronOptions, Model, Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NO_OPTIONS = MegatronOptions()


def transformer_config(
    architecture: Architecture,
    layout: Layout,
    precision: Precision,
    options: MegatronOptions = NO_OPTIONS,
) -> TransformerConfig:
    """Megatron's configuration of this model under this layout.

    Raises:
        UserError: Megatron refuses the combination, or our modules would not follow an option.
    """
    model, machine = architecture.model, platform.detect()
    for problem in check_layout.context(layout, "layout"):
        raise UserError(*problem)
    is_moe = architecture.routing is not None
    sequence_parallel = layout.sequence_parallel
    if sequence_parallel is None:
        sequence_parallel = is_moe and layout.tensor_model_parallel_size > 1
    fields: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "kv_channels": model.kv_channels,
        "layernorm_epsilon": model.layernorm_epsilon,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
        "add_qkv_bias": model.add_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        "softmax_scale": model.softmax_scale,
        "no_rope_freq": model.no_rope_freq and list(model.no_rope_freq),
        "window_size": model.window_size,
        "window_attn_skip_freq": model.window_attn_skip_freq and list(model.window_attn_skip_freq),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline_model_parallel_size,
        # Megatron-LM's own choice. Sent in a batch, what goes to the stage before and to the one
        # behind would be taken for each other where both are one rank (PP 2).
        "overlap_p2p_comm": layout.chunks > 1,
        "batch_p2p_comm": layout.chunks == 1,
        "context_parallel_size": layout.context_parallel_size,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": sequence_parallel,
        "params_dtype": DTYPES[precision],
        "pipeline_dtype": DTYPES[precision],
        "bf16": precision == "bf16",
        # Weights come from a plan (a checkpoint, a mix, named draws), never from Megatron's
        # generators, whose numbers depend on the layout. Not by perform_initialization=False:
        # that also leaves weights unmarked as tensor-parallel, and the gradient norm then takes
        # all but the first rank's for replicas.
        "init_method": _leave_unset,
        "output_layer_init_method": _leave_unset,
        "embedding_init_method": _leave_unset,
        "gradient_accumulation_fusion": True,  # everywhere: mcore_patches.py
        "bias_activation_fusion": not machine.use_transformer_engine,  # rotary.py, swiglu.py and
        "cross_entropy_loss_fusion": not machine.use_transformer_engine,  # cross_entropy.py do it
        "fused_single_qkv_rope": not machine.use_transformer_engine
        and not model.qk_layernorm
        and model.no_rope_freq is None
        and (model.num_query_groups or model.num_attention_heads)
        % layout.tensor_model_parallel_size
        == 0,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": machine.cuda,
        "persist_layer_norm": machine.use_transformer_engine,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
    }
    if is_moe:
        assert architecture.routing is not None
        fields |= {
            "moe_ffn_hidden_size": count.expert_width(model),
            "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
            "moe_shared_expert_gate": model.moe_shared_expert_gate,
            "moe_grouped_gemm": True,
        }
        fields |= transformer_fields(architecture.routing, len(architecture.experts))
    if machine.layers == "torch":
        refuse_unfollowed(
            options.transformer, TORCH_LAYERS, "the layers without Transformer Engine"
        )
    with megatron_errors("transformer"):
        config = TransformerConfig(**(fields | options.transformer))
    if layout.chunks > 1 and (config.batch_p2p_comm or not config.overlap_p2p_comm):
        raise UserError(
            "megatron.transformer.overlap_p2p_comm",
            "virtual pipeline stages need it: with PP 2 the stages before and after are the same "
            "rank, and only overlapped sends keep their messages apart",
            "remove overlap_p2p_comm and batch_p2p_comm",
        )
    if architecture.routing is not None:
        check_config(config, architecture.routing)
    return config


def _leave_unset(_weight: Tensor) -> None: ...


def build_model(
    architecture: Architecture,
    layout: Layout,
    precision: Precision,
    *,
    random_seed: int = 0,
    options: MegatronOptions = NO_OPTIONS,
) -> Any:
    """This rank's part of the model, its weights not yet set: a ``GPTModel`` or, in bf16, one in
    Megatron's ``Float16Module``; with virtual pipeline stages a ``ModuleList`` of such chunks
    (:func:`model_chunks`).

    Args:
        architecture: shapes and experts.
        layout: the job's; ``distributed.initialize(layout, ...)`` has been called. A dense model
            has no use for its groups of experts.
        precision: dtype of weights and activations (bf16: wrapped in Megatron's Float16Module).
        random_seed: seeds the routing's noise.
        options: the recipe's ``megatron:`` block.

    Raises:
        UserError: the experts do not divide over the layout's ranks.
    """
    if not architecture.experts:  # the groups of experts may be there for the job's other models
        layout = layout.dense
    experts, over = len(architecture.experts), layout.expert_model_parallel_size
    if experts % over:
        what = f"is {over}, which does not divide {experts} experts"
        raise UserError("expert_model_parallel_size", what, f"use a divisor of {experts}")
    config = transformer_config(architecture, layout, precision, options)
    if layout.chunks == 1:
        return _chunk(architecture, config, random_seed, None)
    stages = range(layout.chunks)
    return torch.nn.ModuleList(_chunk(architecture, config, random_seed, at) for at in stages)


def _chunk(
    architecture: Architecture, config: TransformerConfig, random_seed: int, vp_stage: int | None
) -> GPTModel | Float16Module:
    where = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    model = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(
            config,
            architecture.routing,
            random_seed,
            vp_stage=vp_stage,
            residual_multiplier=architecture.model.residual_multiplier,
        ),
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        vp_stage=vp_stage,
        **model_fields(architecture),
    )
    scale_ends(model, architecture.model)
    mask_padding(model, architecture)
    model.to(torch.cuda.current_device())
    return Float16Module(config, model) if config.bf16 else model


def model_chunks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The chunks of a model on this rank, one a virtual pipeline stage; without those the model."""
    return list(model) if isinstance(model, torch.nn.ModuleList) else [model]


def canonical_parameters(
    model: torch.nn.Module,
) -> Iterator[tuple[tuple[str, ...], torch.nn.Parameter]]:
    """Every parameter on this rank, with the canonical names of the tensors that it holds.

    ``model`` may be wrapped (DDP, ``Float16Module``).
    """
    for chunk in model_chunks(model):
        inner = unwrap(chunk)
        names = canonical_names(inner)
        for name, parameter in inner.named_parameters():
            yield names[name], parameter


def for_chunks(model: torch.nn.Module, batches: Iterator[Any]) -> Any:
    """Micro-batches as Megatron's schedules take them: of a model in several chunks each asks for
    all of them, at a time of its own."""
    chunks = len(model_chunks(model))
    return list(itertools.tee(batches, chunks)) if chunks > 1 else batches


def model_fields(architecture: Architecture) -> dict[str, Any]:
    """Arguments of Megatron's ``GPTModel`` that say which model this is."""
    model = architecture.model
    return {
        "vocab_size": architecture.padded_vocab_size,
        "max_sequence_length": model.seq_length,
        "share_embeddings_and_output_weights": not model.untie_embeddings_and_output_weights,
        "position_embedding_type": "rope",
        "rotary_base": model.rotary_base,
        "rope_scaling": model.rope_scaling,
        "rope_scaling_factor": model.rope_scaling_factor,
        "seq_len_interpolation_factor": model.seq_len_interpolation_factor,
    }


def scale_ends(model: GPTModel, shape: Model) -> None:
    """Multiply what the embedding gives, and divide the logits (Granite), for which both releases
    of Megatron have no field. The latter before the output layer, whose input is far smaller."""
    factor, divisor = shape.embedding_multiplier, shape.logits_scaling
    if model.pre_process and factor != 1:
        model.embedding.register_forward_hook(lambda _module, _args, output: output * factor)
    if model.post_process and divisor != 1:
        model.output_layer.register_forward_pre_hook(
            lambda _module, args: (args[0] / divisor, *args[1:])
        )


def mask_padding(model: GPTModel, architecture: Architecture) -> None:
    """Keep the rows that pad the vocabulary out of the softmax, in training and evaluation: an
    exported model, which does not have them, then computes the same loss."""
    if not model.post_process or architecture.padded_vocab_size == architecture.vocab_size:
        return
    tp = parallel_state.get_tensor_model_parallel_world_size()
    shard = architecture.padded_vocab_size // tp
    first = parallel_state.get_tensor_model_parallel_rank() * shard
    real = max(0, min(shard, architecture.vocab_size - first))

    def mask(_module: torch.nn.Module, _args: Any, output: tuple[Tensor, Any]) -> Any:
        logits, bias = output
        if real < shard:
            logits[..., real:] = torch.finfo(logits.dtype).min
        return logits, bias

    model.output_layer.register_forward_hook(mask)


def data_parallel_config(
    use_distributed_optimizer: bool, options: MegatronOptions = NO_OPTIONS
) -> DistributedDataParallelConfig:
    """Megatron's configuration of data parallelism; gradients accumulate in fp32.

    Raises:
        UserError: Megatron refuses the combination.
    """
    fields: dict[str, Any] = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": use_distributed_optimizer,
        "overlap_grad_reduce": False,
        "check_for_nan_in_grad": False,
    }
    if options.ddp.get("overlap_param_gather") and not use_distributed_optimizer:
        raise UserError(
            "megatron.ddp.overlap_param_gather",
            "there is nothing to gather without the distributed optimizer",
            "set `use_distributed_optimizer: true`, or remove it",
        )
    with megatron_errors("ddp"):
        return DistributedDataParallelConfig(**(fields | options.ddp))


def wrap_ddp(
    model: torch.nn.Module,
    *,
    use_distributed_optimizer: bool,
    frozen: Collection[str] = (),
    options: MegatronOptions = NO_OPTIONS,
) -> Any:
    """Megatron's gradient buffers around the model, or around each of its :func:`model_chunks`: a
    ``DistributedDataParallel`` or a ``ModuleList`` of them.

    The tensors of the canonical names ``frozen`` get no gradient and take no part in the optimizer,
    not even in its weight decay.

    The schedules' hooks (``no_sync_func``, ``finalize_model_grads_func``, ...) are set on the
    model's configuration, where Megatron's pipeline schedules look for them.
    """
    chunks: list[Any] = model_chunks(model)
    config: TransformerConfig = chunks[0].config
    for chunk in chunks:
        freeze(unwrap(chunk), frozen)
    ddp_config = data_parallel_config(use_distributed_optimizer, options)
    # Buckets let gradients leave early; of later chunks those of the first hide it (Megatron-LM).
    wrapped = [
        DistributedDataParallel(
            config,
            ddp_config,
            chunk,
            disable_bucketing=at > 0,
            **_buffer_layout(chunk, ddp_config, bucketing=at == 0),
        )
        for at, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([ddp.no_sync for ddp in wrapped])
        config.grad_sync_func = _one_or_all([ddp.start_grad_sync for ddp in wrapped])
    if ddp_config.overlap_param_gather and ddp_config.align_param_gather:
        # Else each bucket's gathering is begun by the one before it.
        config.param_sync_func = _one_or_all([ddp.start_param_sync for ddp in wrapped])
    return torch.nn.ModuleList(wrapped) if isinstance(model, torch.nn.ModuleList) else wrapped[0]


def _buffer_layout(
    chunk: torch.nn.Module, ddp_config: DistributedDataParallelConfig, *, bucketing: bool
) -> dict[str, Any]:
    """Where the distributed optimizer's buffers hold each parameter of a chunk: DDP's argument,
    which warns where it has to compute the same itself."""
    if not (DDP_TAKES_LAYOUT and ddp_config.use_distributed_optimizer):
        return {}
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    dense = parallel_state.get_data_parallel_group(
        with_context_parallel=True, partial_data_parallel=True
    )
    experts = parallel_state.get_expert_data_parallel_group(partial_expert_data_parallel=True)
    elements = None  # one bucket
    first = parallel_state.get_pipeline_model_parallel_rank() == 0
    if bucketing and first and ddp_config.overlap_grad_reduce:
        ranks = parallel_state.get_data_parallel_world_size()
        elements = ddp_config.bucket_size or max(40_000_000, 1_000_000 * ranks)  # DDP's default
    layout = DistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in chunk.parameters() if parameter.requires_grad],
        elements,
        dense.size(),
        ddp_config,
        expert_data_parallel_world_size=experts.size(),
    )
    return {"full_param_layout": layout}


def without_ddp(model: torch.nn.Module) -> torch.nn.Module:
    """What :func:`wrap_ddp` was given."""
    inside: list[Any] = [chunk.module for chunk in model_chunks(model)]
    return torch.nn.ModuleList(inside) if isinstance(model, torch.nn.ModuleList) else inside[0]


def _one_or_all(hooks: list[Any]) -> Any:
    """As Megatron's schedules take them: one, or a list with one for every chunk."""
    return hooks if len(hooks) > 1 else hooks[0]


def gather_parameters(model: torch.nn.Module) -> None:
    """Make every parameter whole on this rank before something other than training looks at it:
    with ``overlap_param_gather`` that only happens as the next forward pass goes along."""
    for chunk in model_chunks(model):
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.disable_forward_pre_hook(param_sync=True)
            chunk.enable_forward_pre_hook()


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside Megatron's wrappers, of one chunk."""
    inner: Any = model
    while not isinstance(inner, GPTModel):
        inner = inner.module
    return inner
