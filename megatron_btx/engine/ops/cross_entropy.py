"""The language-model loss with two passes over the logits instead of ten.

It replaces Megatron's ``fused_vocab_parallel_cross_entropy``, which rounds the gradient to bf16 in
any precision. If tensor parallelism divides the vocabulary, Megatron's unfused loss is used.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megatron_btx.engine.ops.swiglu import row_blocks


def cross_entropy(
    logits: Tensor, target: Tensor, tp_group: torch.distributed.ProcessGroup
) -> Tensor:
    """Cross-entropy of every token, in nats.

    Args:
        logits: [S, B, V / TP].
        target: [S, B], token ids.
        tp_group: the ranks that the vocabulary is divided over.

    Returns:
        fp32 [S, B].
    """
    if tp_group.size() > 1:
        return vocab_parallel_cross_entropy(logits, target)
    return _CrossEntropy.apply(logits, target)


class _CrossEntropy(torch.autograd.Function):
    """Saves the logits; the backward pass overwrites them with their gradient, as Megatron's does,
    so it can run only once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target)
        rows, places = logits.flatten(0, 1), target.reshape(-1, 1)
        loss = torch.empty(places.shape, dtype=torch.float32, device=logits.device)
        for block in row_blocks(rows):
            loss[block] = -rows[block].log_softmax(-1, torch.float32).gather(-1, places[block])
        return loss.view_as(target)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, target = ctx.saved_tensors
        rows, places = logits.detach().flatten(0, 1), target.reshape(-1, 1)
        weight = grad_loss.reshape(-1, 1)
        for block in row_blocks(rows):
            grad = rows[block].softmax(-1, torch.float32).mul_(weight[block])
            rows[block] = grad.scatter_add_(-1, places[block], -weight[block])
        return rows.view_as(logits), None
