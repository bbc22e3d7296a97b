"""Rotary positions of queries and keys in one pass, cut from the mixed projection on the way.

Megatron's own fallback splits the projection, negates and concatenates halves and multiplies, and
autograd concatenates again on the way back: on a CPU that is a fifth of a small model's step. This
function stands where Megatron calls Transformer Engine's (``fused_single_qkv_rope``).
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
    """Queries and keys rotated by their positions (arXiv 2104.09864, halves as in Llama), values.

    Args:
        mixed_qkv: [S, B, G, (R + 2) D]: of every group the queries, the key, the value.
        q_angles: [S, 1, 1, D], fp32, the second half equal to the first.
        k_angles: the same; self-attention has one.
        qkv_split_arg_list: [R D, D, D].

    Returns:
        [S, B, N, D], [S, B, G, D], [S, B, G, D], laid out in memory as attention reads them,
        [B, heads, S, D].

    Raises:
        ValueError: angles of a kind that this function does not know.
    """
    width = qkv_split_arg_list[-1]
    if k_angles is not q_angles or q_angles.shape[1:] != (1, 1, width):
        raise ValueError(
            "rotary positions of a part of a head, or of a batch of their own, need "
            "fused_single_qkv_rope: false"
        )
    return _SplitAndRotate.apply(mixed_qkv, q_angles, width)


class _SplitAndRotate(torch.autograd.Function):
    """The rotation is linear: its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, mixed_qkv: Tensor, angles: Tensor, width: int) -> tuple[Tensor, ...]:
        cos, sin = _cos_sin(angles, mixed_qkv.dtype)
        ctx.save_for_backward(cos, sin)
        ctx.shape = mixed_qkv.shape
        q, k, v = _parts(mixed_qkv, width)
        q_out, k_out, v_out = (_heads_first_like(part) for part in (q, k, v))
        _rotate(q, cos, sin, out=q_out)
        _rotate(k, cos, sin, out=k_out)
        v_out.copy_(v)
        return tuple(part.flatten(2, 3) for part in (q_out, k_out, v_out))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        grad_mixed = grads[0].new_empty(ctx.shape)
        q, k, v = _parts(grad_mixed, grads[0].shape[-1])
        grad_q, grad_k, grad_v = (
            grad.unflatten(2, part.shape[2:4]) for grad, part in zip(grads, (q, k, v), strict=True)
        )
        # In the memory order of attention first: rotating into the narrow strips of the mixed
        # tensor takes twice as long.
        for grad, part in ((grad_q, q), (grad_k, k)):
            back = _heads_first_like(part)
            _rotate(grad, cos, -sin, out=back)
            part.copy_(back)
        v.copy_(grad_v)
        return grad_mixed, None, None


def _cos_sin(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[S, 1, 1, 1, D / 2] each, rounded to the dtype of what they multiply, as Megatron's are."""
    half = angles[..., : angles.shape[-1] // 2].unsqueeze(2)
    return half.cos().to(dtype), half.sin().to(dtype)


def _parts(mixed_qkv: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views [S, B, G, R, D], [S, B, G, 1, D] and [S, B, G, 1, D]."""
    heads = mixed_qkv.unflatten(-1, (-1, width))
    return heads[..., :-2, :], heads[..., -2:-1, :], heads[..., -1:, :]


def _heads_first_like(part: Tensor) -> Tensor:
    """Unset memory of a part's shape, in the order [B, G, R, S, D]."""
    seq, batch, groups, repeats, width = part.shape
    return part.new_empty(batch, groups, repeats, seq, width).permute(3, 0, 1, 2, 4)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """``(a, b) -> (a cos - b sin, b cos + a sin)`` for the halves a, b of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    out_a, out_b = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).sub_(b * sin)
    torch.mul(b, cos, out=out_b).add_(a * sin)
