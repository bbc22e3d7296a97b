"""SwiGLU and its gradient in few passes over memory.

Autograd's chain (chunk, silu, product, and a concatenation on the way back) moves each element some
fifteen times. This works through a block of rows at a time (:func:`row_blocks`), with torch's own
kernels for silu and its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

BLOCK_ELEMENTS = 1 << 17
"""Of a block of rows, for every thread: half a megabyte in fp32, of which some three are live. Much
smaller, and torch does not share an operation between threads."""


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Runs of rows of a matrix that fit into a CPU's caches together; on a GPU all rows at once.

    A chain of small operations over a large matrix reads it from memory and writes it back once an
    operation; over a block of its rows that stays in a core's cache it does so once.
    """
    rows = len(x)
    step = max(1, rows)
    if x.device.type == "cpu":
        step = max(1, BLOCK_ELEMENTS * torch.get_num_threads() // x.shape[1])
    for first in range(0, rows, step):
        yield slice(first, first + step)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` (arXiv 2002.05202).

    Args:
        gate_up: [..., 2F], the gate's half first.

    Returns:
        [..., F] in the dtype of ``gate_up``.
    """
    out = _SwiGLU.apply(gate_up.flatten(0, -2))
    return out.view(*gate_up.shape[:-1], out.shape[-1])


def bias_swiglu(gate_up: Tensor, bias: Tensor | None, *_options: bool) -> Tensor:
    """``swiglu`` for Megatron's ``MLP``, in the place of its ``bias_swiglu_impl``."""
    return swiglu(gate_up if bias is None else gate_up + bias)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input and nothing else; the activation is computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return activate(gate_up)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        return gradient(gate_up, grad_out)


def activate(gate_up: Tensor, used: int | None = None) -> Tensor:
    """``swiglu`` of rows [T, 2F], of the first ``used`` of them, outside of autograd: [T, F]."""
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    for rows in row_blocks(gate_up[:used]):
        gate, up = gate_up[rows].chunk(2, dim=-1)
        torch.mul(silu(gate), up, out=out[rows])
    return out


def gradient(
    gate_up: Tensor, grad_out: Tensor, used: int | None = None, again: Tensor | None = None
) -> Tensor:
    """The gradient [T, 2F] of ``activate(gate_up, used)``, given that of its result [T, F]; the
    result itself is written into ``again`` [T, F] where that is given."""
    grad = torch.empty_like(gate_up)
    for rows in row_blocks(gate_up[:used]):
        gate, up = gate_up[rows].chunk(2, dim=-1)
        grad_gate, grad_up = grad[rows].chunk(2, dim=-1)
        activated = silu(gate)
        if again is not None:
            torch.mul(activated, up, out=again[rows])
        torch.mul(grad_out[rows], activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_out[rows] * up, gate, grad_input=grad_gate)
    return grad
