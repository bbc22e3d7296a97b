"""The language model's loss in three passes over the logits instead of ten.

It stands for Megatron's ``fused_vocab_parallel_cross_entropy``, which rounds the gradient to bf16
whatever the model's precision. Where tensor parallelism cuts the vocabulary, Megatron's unfused
loss runs.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


def cross_entropy(
    logits: Tensor, target: Tensor, tp_group: torch.distributed.ProcessGroup
) -> Tensor:
    """Loss of every token, fp32, in nats.

    Args:
        logits: [S, B, V / TP].
        target: [S, B], token ids.
        tp_group: the ranks that share the vocabulary.
    """
    if tp_group.size() > 1:
        return vocab_parallel_cross_entropy(logits, target)
    return _CrossEntropy.apply(logits, target)


class _CrossEntropy(torch.autograd.Function):
    """Keeps log-probabilities, and turns them into the gradient in place: once, like Megatron's."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(log_probabilities, target)
        return -log_probabilities.gather(-1, target.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        log_probabilities, target = ctx.saved_tensors
        grad = log_probabilities.exp_()
        grad.mul_(grad_loss.unsqueeze(-1))
        grad.scatter_add_(-1, target.unsqueeze(-1), -grad_loss.unsqueeze(-1))
        return grad.to(ctx.dtype), None
