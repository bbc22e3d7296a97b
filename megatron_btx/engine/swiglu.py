"""SwiGLU and its gradient in few passes over memory.

Autograd's chain (chunk, silu, two products, and a concatenation on the way back) moves each element
some fifteen times. This works through a few rows at a time, small enough for a core's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

_CACHED_ELEMENTS = 1 << 17
"""Of a block of rows, for every thread: half a megabyte in fp32, of which some three are live. Much
smaller, and torch does not share an operation between threads."""


def swiglu(gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
    """``silu(gate) * up`` (arXiv 2002.05202), times a number for every row.

    Args:
        gate_up: [..., 2F], the gate's half first.
        scale: [...], a mixture's gates; ``None``: one.

    Returns:
        [..., F] in the dtype of ``gate_up``.
    """
    rows = gate_up.flatten(0, -2)
    out = _SwiGLU.apply(rows, None if scale is None else scale.flatten())
    return out.view(*gate_up.shape[:-1], out.shape[-1])


def bias_swiglu(gate_up: Tensor, bias: Tensor | None, *_options: bool) -> Tensor:
    """``swiglu`` for Megatron's ``MLP``, in the place of its ``bias_swiglu_impl``."""
    return swiglu(gate_up if bias is None else gate_up + bias)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input and nothing else; the activation is computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, scale)
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        for rows in _blocks(gate_up):
            gate, up = gate_up[rows].chunk(2, dim=-1)
            block = torch.mul(silu(gate.contiguous()), up, out=out[rows])
            if scale is not None:
                block.mul_(scale[rows].unsqueeze(-1).to(block.dtype))
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """With s the sigmoid of the gate: silu' = s (1 + gate - gate s)."""
        gate_up, scale = ctx.saved_tensors
        grad = torch.empty_like(gate_up)
        grad_scale = None if scale is None else torch.empty_like(scale)
        for rows in _blocks(gate_up):
            gate, up = gate_up[rows].chunk(2, dim=-1)
            grad_gate, grad_up = grad[rows].chunk(2, dim=-1)
            gate = gate.contiguous()  # exponentials of strided rows take twice as long
            sigmoid = gate.sigmoid()
            activated = gate * sigmoid
            grad_product = grad_out[rows]
            if grad_scale is not None:
                products = (activated * up).mul_(grad_product)
                grad_scale[rows] = products.sum(-1, dtype=grad_scale.dtype)
                grad_product = grad_product * scale[rows].unsqueeze(-1).to(grad.dtype)
            torch.mul(grad_product, activated, out=grad_up)
            slope = gate.sub_(activated).add_(1).mul_(sigmoid)
            torch.mul(slope, up, out=grad_gate).mul_(grad_product)
        return grad, grad_scale


def _blocks(x: Tensor) -> Iterator[slice]:
    """Runs of rows that fit into a CPU's caches together; on a GPU all rows at once."""
    rows = len(x)
    step = max(1, rows)
    if x.device.type == "cpu":
        step = max(1, _CACHED_ELEMENTS * torch.get_num_threads() // x.shape[1])
    for first in range(0, rows, step):
        yield slice(first, first + step)
