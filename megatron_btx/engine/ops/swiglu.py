"""SwiGLU and its gradient with few passes over memory.

The usual chain of operations (chunk, silu, product; a concatenation in the backward pass) moves
each element about fifteen times. This one processes a block of rows at a time (:func:`row_blocks`),
with torch's kernels for silu and its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

BLOCK_ELEMENTS = 1 << 17
"""Elements of a block of rows per thread: half a megabyte in fp32; about three blocks are live. For
much smaller ones torch does not divide an operation among threads."""


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Blocks of rows of ``x`` [T, W] that fit into a CPU's caches; on a GPU one block with all
    rows.

    A chain of element-wise operations over a large matrix reads and writes memory once per
    operation; over a block that stays in cache, once for the whole chain.
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
    """``swiglu`` with the interface of Megatron's ``bias_swiglu_impl``, which it replaces in
    ``MLP``."""
    return swiglu(gate_up if bias is None else gate_up + bias)


class _SwiGLU(torch.autograd.Function):
    """Saves only its input; the backward pass recomputes the activation."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return activate(gate_up)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        return gradient(gate_up, grad_out)


def activate(gate_up: Tensor, used: int | None = None) -> Tensor:
    """``swiglu`` without autograd.

    Args:
        gate_up: [T, 2F], the gate's half first.
        used: only the first so many rows are computed; ``None``: all.

    Returns:
        [T, F]; rows that are not computed are uninitialised.
    """
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    for rows in row_blocks(gate_up[:used]):
        gate, up = gate_up[rows].chunk(2, dim=-1)
        torch.mul(silu(gate), up, out=out[rows])
    return out


def gradient(
    gate_up: Tensor, grad_out: Tensor, used: int | None = None, again: Tensor | None = None
) -> Tensor:
    """The gradient of :func:`activate`.

    Args:
        gate_up: [T, 2F], its input.
        grad_out: [T, F], the gradient of its result.
        used: as there.
        again: [T, F]; if given, its result is recomputed into it.

    Returns:
        [T, 2F], the gradient of ``gate_up``.
    """
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
