"""Attention without Transformer Engine, behind Megatron's interface: torch's fused kernel on a GPU,
batched products on a CPU (engine/ops/cpu_attention.py).

Megatron's own fallback stores the S x S scores of every head; neither of these does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_btx.engine.ops import cpu_attention

# Shapes: S sequence, B micro-batch, N query heads here, G key/value heads here, D width of a head.


class ScaledDotProductAttention(MegatronModule):
    """Causal self-attention core, for ``SelfAttentionSubmodules(core_attention=...)``.

    Args:
        config: Megatron's; grouped-query attention (``num_query_groups``) is supported.
        layer_number: from 1; decides whether the layer has a sliding window.
        attn_mask_type: must be causal.
        softmax_scale: multiplies the scores; ``None``: ``1 / sqrt(D)``.

    Raises:
        ValueError: the configuration asks for something that this kernel does not compute.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        before, after = config.window_size if windowed else (None, 0)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        for name, asked in {
            "context parallelism": config.context_parallel_size > 1,
            "attention dropout": dropout > 0,
            "query-key layer scaling": config.apply_query_key_layer_scaling,
            "a softmax offset": config.softmax_type != "vanilla",
            "a window over tokens to come": after != 0,
            "a mask other than the causal one": attn_mask_type is not AttnMaskType.causal,
        }.items():
            if asked:
                raise ValueError(f"{name} needs Transformer Engine's attention")
        self.softmax_scale = softmax_scale
        self.window: int | None = before
        """How many earlier tokens a token attends to; ``None``: all."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attention of every token to itself and earlier ones.

        Args:
            query: [S, B, N, D], rotated.
            key: [S, B, G, D], rotated; G divides N.
            value: [S, B, G, D].
            attention_mask: int64 [B, S], the first position that each token attends to (where its
                document begins); ``None``: 0. The mask is always causal too, with or without a
                window.

        Returns:
            [S, B, N * D], in the dtype of ``query``.

        Raises:
            ValueError: another kind of mask, a bias or packed sequences are given.
        """
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("a mask other than the beginnings of documents is not followed")
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("attention bias and packed sequences need Transformer Engine")
        repeats = query.shape[2] // key.shape[2]
        attend = _by_products if query.device.type == "cpu" else _fused
        context_BNSD = attend(
            query.permute(1, 2, 0, 3),
            _heads_first(key, repeats),
            _heads_first(value, repeats),
            self.window,
            self.softmax_scale,
            attention_mask,
        )
        return context_BNSD.permute(2, 0, 1, 3).flatten(2)


def _by_products(
    query_BNSD: Tensor,
    key_BNSD: Tensor,
    value_BNSD: Tensor,
    window: int | None,
    scale: float | None,
    begins_BS: Tensor | None,
) -> Tensor:
    """:func:`cpu_attention.attend` on [B, N, S, D]."""
    heads = (part.flatten(0, 1) for part in (query_BNSD, key_BNSD, value_BNSD))
    begins = None if begins_BS is None else begins_BS.repeat_interleave(query_BNSD.shape[1], 0)
    context_HSD = cpu_attention.attend(*heads, window=window, scale=scale, begins=begins)
    return context_HSD.unflatten(0, query_BNSD.shape[:2])


def _fused(
    query_BNSD: Tensor,
    key_BNSD: Tensor,
    value_BNSD: Tensor,
    window: int | None,
    scale: float | None,
    begins_BS: Tensor | None,
) -> Tensor:
    """torch's fused kernel on [B, N, S, D]."""
    seq, within = query_BNSD.shape[2], None
    if window is not None and window + 1 < seq:
        within = _band(seq, window, query_BNSD.device)
    if begins_BS is not None:
        band = _band(seq, seq, query_BNSD.device) if within is None else within
        place = torch.arange(seq, device=begins_BS.device)
        within = (band & (place >= begins_BS.unsqueeze(-1))).unsqueeze(1)
    return scaled_dot_product_attention(
        query_BNSD, key_BNSD, value_BNSD, attn_mask=within, is_causal=within is None, scale=scale
    )


@functools.lru_cache(maxsize=4)
def _band(seq: int, window: int, device: torch.device) -> Tensor:
    """Mask [S, S] bool: position i attends to i - window ... i."""
    place = torch.arange(seq, device=device)
    distance = place.unsqueeze(1) - place
    return (distance >= 0) & (distance <= window)


def _heads_first(x_SBGD: Tensor, repeats: int) -> Tensor:
    """[S, B, G, D] -> [B, N, S, D]; a view if the heads are not repeated, or there is only one."""
    seq, batch, heads, width = x_SBGD.shape
    x_BGSD = x_SBGD.permute(1, 2, 0, 3)
    if repeats == 1:
        return x_BGSD
    expanded = x_BGSD.unsqueeze(2).expand(batch, heads, repeats, seq, width)
    return expanded.reshape(batch, heads * repeats, seq, width)
