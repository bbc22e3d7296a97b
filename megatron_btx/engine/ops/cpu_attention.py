"""Causal attention on a CPU by torch's batched matrix products, one block of queries at a time.

torch's fused CPU kernel multiplies blocks of 32 rows, one head at a time; products over many heads
at once are faster (docs/benchmarks.md), and use the faster of MKL and oneDNN
(engine/cpu_tuning.py). Only one block's scores are in memory at a time; the backward pass
recomputes them, except for short sequences (``recipe.memory.keeps_probabilities``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_btx.engine.ops.swiglu import BLOCK_ELEMENTS
from megatron_btx.recipe.memory import keeps_probabilities, query_rows

# Shapes: H heads of all sequences of the micro-batch, S sequence, D width of a head.


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    begins: Tensor | None = None,
) -> Tensor:
    """Causal scaled dot-product attention (arXiv 1706.03762, equation 1).

    Scores and their softmax are fp32 whatever the inputs are.

    Args:
        query: [H, S, D].
        key: [H, S, D].
        value: [H, S, D].
        window: how many earlier tokens a token attends to; ``None``: all.
        scale: multiplies the scores; ``None``: ``1 / sqrt(D)``.
        begins: int64 [H, S], the first position that a token attends to, at most its own;
            ``None``: 0.

    Returns:
        [H, S, D] in the dtype of ``query``, in the memory order [S, H, D].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _Attend.apply(query, key, value, window, scale, begins)


class _Attend(torch.autograd.Function):
    """Saves its inputs, and for short sequences the probabilities."""

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        scale: float,
        begins: Tensor | None,
    ) -> Tensor:
        ctx.window, ctx.scale, ctx.begins = window, scale, begins
        out, inputs, kept = _sequence_first(query), (query, key, value), []
        keeps = keeps_probabilities(*query.shape[1:])
        query, key, value = query.float() * scale, key.float(), value.float()
        for heads, rows, seen in _blocks(query, window):
            others = _other_documents(begins, heads, rows, seen)
            probabilities = _probabilities(query[heads, rows], key[heads, seen], window, others)
            out[heads, rows] = torch.bmm(probabilities, value[heads, seen])
            if keeps:
                kept.append(probabilities)
        ctx.save_for_backward(*inputs, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dtype = grad_out.dtype
        query, key, value, *kept = (saved.float() for saved in ctx.saved_tensors)
        kept.reverse()
        query, grad_out = query * ctx.scale, grad_out.float()
        grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key)
        grad_value = torch.zeros_like(value)
        for heads, rows, seen in _blocks(query, ctx.window):
            q, grad = query[heads, rows], grad_out[heads, rows]
            k, v = key[heads, seen], value[heads, seen]
            if kept:
                probabilities = kept.pop()
            else:
                others = _other_documents(ctx.begins, heads, rows, seen)
                probabilities = _probabilities(q, k, ctx.window, others)
            grad_probabilities = torch.bmm(grad, v.mT)
            grad_scores = torch._softmax_backward_data(
                grad_probabilities, probabilities, -1, probabilities.dtype
            )
            grad_query[heads, rows] = torch.bmm(grad_scores, k)
            grad_key[heads, seen] += torch.bmm(grad_scores.mT, q)
            grad_value[heads, seen] += torch.bmm(probabilities.mT, grad)
        grad_query.mul_(ctx.scale)
        grads = (grad.to(dtype) for grad in (grad_query, grad_key, grad_value))
        return (*grads, None, None, None)


def _probabilities(query: Tensor, key: Tensor, window: int | None, others: Tensor | None) -> Tensor:
    """Attention probabilities [h, R, K] of the last R of K tokens; those of ``others`` (bool
    [h, R, K]), keys in earlier documents, are zero."""
    scores = torch.bmm(query, key.mT)
    mask = _causal_mask(query.shape[1], key.shape[1], window)
    scores[..., -mask.shape[1] :] += mask
    if others is not None:
        scores.masked_fill_(others, -math.inf)
    return scores.softmax(-1)


@functools.lru_cache(maxsize=32)
def _causal_mask(rows: int, keys: int, window: int | None) -> Tensor:
    """Additive mask [R, K] of the last R of K tokens: minus infinity for keys that they do not
    attend to, else zero. Without a window [R, R]: all of them attend to the keys before these."""
    if window is None:
        keys = rows
    behind = torch.arange(keys - rows, keys).unsqueeze(1) - torch.arange(keys)
    seen = behind >= 0 if window is None else (behind >= 0) & (behind <= window)
    return torch.zeros(rows, keys).masked_fill_(~seen, -math.inf)


def _other_documents(
    begins: Tensor | None, heads: slice, rows: slice, seen: slice
) -> Tensor | None:
    """Which keys of a block belong to an earlier document than the query, bool [h, R, K]."""
    if begins is None:
        return None
    return torch.arange(seen.start, seen.stop) < begins[heads, rows].unsqueeze(-1)


def _blocks(query: Tensor, window: int | None) -> Iterator[tuple[slice, slice, slice]]:
    """(heads, queries, the keys that these attend to) of blocks whose scores fit into the cores'
    caches."""
    heads, seq, _ = query.shape
    rows = query_rows(seq)
    for first in range(0, seq, rows):
        last = min(first + rows, seq)
        start = 0 if window is None else max(0, first - window)
        step = max(1, BLOCK_ELEMENTS * torch.get_num_threads() // ((last - first) * (last - start)))
        for head in range(0, heads, step):
            yield slice(head, head + step), slice(first, last), slice(start, last)


def _sequence_first(query: Tensor) -> Tensor:
    """Uninitialised [H, S, D], in the memory order [S, H, D] of the projection that reads it."""
    heads, seq, width = query.shape
    return query.new_empty(seq, heads, width).transpose(0, 1)
