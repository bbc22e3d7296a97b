"""Token permutation for the MoE dispatchers on a CPU, by gathers instead of scatter-adds.

These functions replace those of the same names in ``megatron.core.transformer.moe.moe_utils`` that
Megatron's token dispatchers call. Both directions and both gradients write rows in order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from megatron_btx.engine.megatron_release import PERMUTE_RETURNS_PADDING

# Shapes: T tokens, N experts, P rows of tokens sorted by expert, H hidden.


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | Tensor | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> tuple[Any, ...]:
    """Copy tokens to rows sorted by expert, and within an expert by token.

    Args:
        tokens: [T, H].
        routing_map: [T, N], bool.
        probs: [T, N], the gates.
        num_out_tokens: ignored; P is counted.
        fused, drop_and_pad: must be false.

    Returns:
        Rows [P, H]; their gates [P] or ``None``; their tokens' indices int64 [P]; and, in releases
        of Megatron that return two values of padding more, ``None`` twice.
    """
    assert not fused
    assert not drop_and_pad
    # One search of the map gives both the rows and their gates.
    pairs = routing_map.t().flatten().nonzero().squeeze(1)
    rows = pairs % len(tokens)
    gates = None if probs is None else probs.t().flatten().index_select(0, pairs)
    padding = (None, None) if PERMUTE_RETURNS_PADDING else ()
    return _Gather.apply(tokens, rows, routing_map), gates, rows, *padding


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: torch.Size,
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> Tensor:
    """Sum the rows of every token; the experts have applied the gates already.

    Args:
        permuted_tokens: [P, H], in the order of :func:`permute`.
        sorted_indices: int64 [P], the rows' tokens.
        restore_shape: (T, H).
        routing_map: bool [T, N], the one of :func:`permute`.

    Returns:
        [T, H].
    """
    assert probs is None, "the experts apply the gates"
    assert routing_map is not None
    assert not fused
    assert not drop_and_pad
    return _SumRows.apply(permuted_tokens, sorted_indices, routing_map)


def sort_chunks_by_idxs(
    input: Tensor,
    split_sizes: Tensor,
    sorted_idxs: Tensor,
    probs: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Reorder chunks of rows.

    Args:
        input: rows [P, ...].
        split_sizes: rows of each chunk.
        sorted_idxs: the chunks in their new order.
        probs: reordered likewise.
        fused: must be false.

    Returns:
        Rows and ``probs``; the arguments themselves if the order does not change.
    """
    assert not fused
    order = sorted_idxs.tolist()
    if order == list(range(len(order))):
        return input, probs
    sizes = split_sizes.tolist()

    def sort(x: Tensor) -> Tensor:
        chunks = x.split(sizes)
        return torch.cat([chunks[which] for which in order])

    return sort(input), None if probs is None else sort(probs)


class _Gather(torch.autograd.Function):
    """Row p of the output is token ``rows[p]``."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: Tensor, routing_map: Tensor) -> Tensor:
        ctx.save_for_backward(routing_map)
        return tokens.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _sum_rows(grad, *ctx.saved_tensors), None, None


class _SumRows(torch.autograd.Function):
    """The transpose of ``_Gather``."""

    @staticmethod
    def forward(ctx: Any, permuted: Tensor, rows: Tensor, routing_map: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return _sum_rows(permuted, routing_map)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad.index_select(0, *ctx.saved_tensors), None, None


def _sum_rows(permuted: Tensor, routing_map: Tensor) -> Tensor:
    """[P, H] -> [T, H]; a token's rows are summed in the order of its experts."""
    # Row of (token, expert): the number of routed pairs before it, expert by expert.
    places = routing_map.t().flatten().cumsum(0).view(routing_map.shape[::-1]).t()
    mine = places.masked_select(routing_map).sub_(1)
    counts = routing_map.sum(1)
    starts = counts.cumsum(0).sub_(counts)
    return embedding_bag(mine, permuted.contiguous(), starts, mode="sum")
