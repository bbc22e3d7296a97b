"""Splits the QKV projection and applies rotary position embeddings to queries and keys.

Megatron's unfused version splits the projection, negates and concatenates halves, multiplies, and
concatenates again in the backward pass: on a CPU this takes a fifth of a small model's step. This
function replaces the one of Transformer Engine that Megatron calls with ``fused_single_qkv_rope``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Shapes: S sequence, B micro-batch, G key/value heads here, R query heads to each of them, D width
# of a head; N = G R.


def split_and_rotate(
    mixed_qkv: Tensor, q_angles: Tensor, k_angles: Tensor, qkv_split_arg_list: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with rotary embeddings (arXiv 2104.09864, in Llama's half-split form),
    values.

    Args:
        mixed_qkv: [S, B, G, (R + 2) D]: for every group its queries, key and value.
        q_angles: [S, 1, 1, D], fp32, the second half equal to the first.
        k_angles: the same tensor, as in self-attention.
        qkv_split_arg_list: [R D, D, D].

    Returns:
        Queries [S, B, N, D], keys and values [S, B, G, D], in the memory order [B, heads, S, D] in
        which attention reads them.

    Raises:
        ValueError: the angles cover a part of a head only, or differ between keys and queries.
    """
    width = qkv_split_arg_list[-1]
    if k_angles is not q_angles or q_angles.shape[1:] != (1, 1, width):
        raise ValueError(
            "rotary positions of a part of a head, or of a batch of their own, need "
            "fused_single_qkv_rope: false"
        )
    return _SplitAndRotate.apply(mixed_qkv, q_angles, width)


class _SplitAndRotate(torch.autograd.Function):
    """The gradient of the rotation is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, mixed_qkv: Tensor, angles: Tensor, width: int) -> tuple[Tensor, ...]:
        cos, sin = _cos_sin(angles, mixed_qkv.dtype)
        ctx.save_for_backward(cos, sin)
        ctx.shape = mixed_qkv.shape
        q, k, v = (part.contiguous() for part in _parts(mixed_qkv, width))
        turned = (_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        return tuple(part.flatten(1, 2).permute(2, 0, 1, 3) for part in turned)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        grad_mixed = grads[0].new_empty(ctx.shape)
        parts = _parts(grad_mixed, grads[0].shape[-1])
        grad_q, grad_k, grad_v = (
            grad.permute(1, 2, 0, 3).contiguous().view(part.shape)
            for grad, part in zip(grads, parts, strict=True)
        )
        q, k, v = parts
        q.copy_(_rotate(grad_q, cos, -sin))
        k.copy_(_rotate(grad_k, cos, -sin))
        v.copy_(grad_v)
        return grad_mixed, None, None


def _cos_sin(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(cos, cos)`` and ``(-sin, sin)`` of the two halves, both [S D], rounded to ``dtype`` as in
    Megatron."""
    half = angles[..., : angles.shape[-1] // 2].flatten(1)
    cos, sin = half.cos().to(dtype), half.sin().to(dtype)
    return torch.cat((cos, cos), -1).flatten(), torch.cat((-sin, sin), -1).flatten()


def _parts(mixed_qkv: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of queries [B, G, R, S, D], keys and values [B, G, 1, S, D]."""
    heads = mixed_qkv.unflatten(-1, (-1, width)).permute(1, 2, 3, 0, 4)
    return heads[:, :, :-2], heads[:, :, -2:-1], heads[:, :, -1:]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``(a, b) -> (a cos - b sin, b cos + a sin)`` for the halves a, b of the last dimension. It
    works on whole heads [S D]: on halves of a head's width torch's kernels are many times
    slower."""
    a, b = x.chunk(2, dim=-1)
    swapped = torch.cat((b, a), -1).flatten(-2)
    return (x.flatten(-2) * cos).addcmul_(swapped, sin).view_as(x)
