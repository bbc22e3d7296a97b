"""Repairs of Megatron-Core where a fused library is missing, on a GPU or without one; of 0.16 and
0.19 alike unless a row says otherwise.

Each row of ``install`` says its condition; where the libraries are present nothing is done.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from typing import Any

import torch
from torch import Tensor

from megatron_btx.engine.platform import Platform


@functools.cache
def install(platform: Platform) -> None:
    """Apply what this platform needs. Call it after ``cpu.install()``, before building a model."""
    # Weight gradients into DDP's buffer without a copy between: Apex has a kernel for it, which
    # Megatron's own layers (under Transformer Engine the output layer) require.
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    if not layers._grad_accum_fusion_available:
        _bind(layers.__name__, _grad_accum_fusion_available=True)
        _new(layers.__name__, fused_weight_gradient_mlp_cuda=_WEIGHT_GRADIENT)
    if not platform.use_transformer_engine:
        # Bound only inside `try: import transformer_engine`, then read: by the router's product (in
        # 0.16), and where norms are recomputed (`recompute_modules: [layernorm]`).
        _new("megatron.core.transformer.moe.moe_utils", te_general_gemm=None)
        _new("megatron.core.tensor_parallel.random", **_NO_FP8)
        # Megatron's own places for fused kernels, given plain torch's. The model's configuration
        # asks for them: fused_single_qkv_rope, cross_entropy_loss_fusion, bias_activation_fusion.
        from megatron_btx.engine.ops.cross_entropy import cross_entropy
        from megatron_btx.engine.ops.rotary import split_and_rotate
        from megatron_btx.engine.ops.swiglu import bias_swiglu

        attention = "megatron.core.transformer.attention"
        _bind(attention, HAVE_FUSED_QKV_ROPE=True)
        _new(attention, apply_fused_qkv_rotary_pos_emb=split_and_rotate)
        language_module = "megatron.core.models.common.language_module.language_module"
        _bind(language_module, fused_vocab_parallel_cross_entropy=cross_entropy)
        _bind("megatron.core.transformer.mlp", bias_swiglu_impl=bias_swiglu)
    if platform.optimizer == "torch":
        # Its stand-in for Apex's kernel scales gradients into new memory and copies them back.
        _bind("megatron.core.optimizer.clip_grads", multi_tensor_scale_impl=_scale)
        # torch's AdamW keeps `step` per tensor, the fused ones per group, and the distributed
        # optimizer's checkpoints are written for the latter: `KeyError: 'step'` when loading.
        from megatron_btx.engine.optimizer import Adam

        _bind("megatron.core.optimizer", Adam=Adam, USING_PYTORCH_OPTIMIZER=False)
        _bind(
            "megatron.core.optimizer.distrib_optimizer",
            Adam=Adam,
            HAVE_APEX_OR_TE=True,
            USING_APEX_OPTIMIZER=True,
        )


def _add_weight_gradient(x: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """``main_grad += grad_output^T x`` for rows x [T, K] and grad_output [T, M]."""
    if x.dtype == main_grad.dtype:
        main_grad.addmm_(grad_output.t(), x)
    else:
        main_grad.add_(torch.mm(grad_output.t(), x))


def _scale(
    _chunk_size: int, _noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float
) -> None:
    """Megatron's ``local_multi_tensor_scale``: ``target = source * scale`` for two lists."""
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)


# For Transformer Engine's of these names.
_NO_FP8 = {
    "FP8GlobalStateManager": types.SimpleNamespace(is_fp8_enabled=lambda: False),
    "activation_recompute_forward": lambda **_: contextlib.nullcontext(),
    "fp8_autocast": lambda **_: contextlib.nullcontext(),
}

# For Apex's CUDA extension of that name.
_WEIGHT_GRADIENT = types.SimpleNamespace(
    wgrad_gemm_accum_fp32=_add_weight_gradient, wgrad_gemm_accum_fp16=_add_weight_gradient
)


def _bind(module_name: str, **names: Any) -> None:
    """Give names of a module other values.

    Raises:
        LookupError: the module has no such name: this Megatron-Core is another one.
    """
    module = importlib.import_module(module_name)
    for name, value in names.items():
        if not hasattr(module, name):
            raise LookupError(f"{module_name}.{name} is gone from this Megatron-Core")
        setattr(module, name, value)


def _new(module_name: str, **names: Any) -> None:
    """Names that the module would have imported from a package that is not there."""
    module = importlib.import_module(module_name)
    for name, value in names.items():
        setattr(module, name, value)
