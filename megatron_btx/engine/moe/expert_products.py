"""The experts' feed-forward layers as grouped matrix products, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from megatron_btx.engine import cpu_tuning
from megatron_btx.engine.ops import swiglu

# Shapes: T tokens that reached this rank, E experts here, H hidden, F width of an expert here.

Held = tuple[Tensor, tuple[int, ...]]
"""Weights of the frozen experts [E - number of others, ...], and the numbers of the others."""


def arranged(weight: Tensor, held: Held | None) -> Tensor:
    """Weights [E, ...] of all experts in order, trainable and frozen."""
    if held is None:
        return weight
    frozen, learn = held
    learned, still = iter(weight.unbind()), iter(frozen.unbind())
    places = range(len(weight) + len(frozen))
    return torch.stack([next(learned if place in learn else still) for place in places])


_TILE = 64


def feed_forward(  # noqa: PLR0913
    x: Tensor,
    counts: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    fuse: bool,
    held: tuple[Held | None, Held | None] = (None, None),
) -> Tensor:
    """``W2 swiglu(W1 x)``, with each row's expert's matrices.

    Args:
        x: rows [T, H], sorted by expert.
        counts: integers [E], the number of each expert's rows.
        fc1: [E, 2F, H].
        fc2: [E, H, F].
        fuse: add the weights' gradients to their ``main_grad``, if they have one (Megatron's
            ``gradient_accumulation_fusion``).
        held: the frozen experts of ``fc1`` and ``fc2``, which these then do not contain.

    Returns:
        [T, H].
    """
    tile = _TILE if x.device.type == "cpu" and cpu_tuning.onednn_multiplies(x.dtype) else 1
    return _FeedForward.apply(x, fc1, fc2, counts, fuse, tile, held)


class _Tiles:
    """Rows padded with zeros, so that each expert's begin at a multiple of a tile.

    Where oneDNN computes the products (engine/cpu_tuning.py), it generates machine code for each
    new number of rows, which takes twenty times as long as the product at the demo's size, and half
    a megabyte. The padded tensor has one of few sizes, so that the allocator can reuse memory.
    """

    def __init__(self, counts: Tensor, tile: int, device: torch.device) -> None:
        self.apart = tile > 1
        self.used: int | None = None
        """Number of padded rows up to the end of the last expert's; ``None``: all."""
        padded = counts + -counts % tile
        self.ends = padded.cumsum(0).to(device=device, dtype=torch.int32)
        """int32 [E], the end of each expert's rows; rows after the last are neither read nor
        written."""
        if self.apart:
            self.counts = counts.tolist()
            self.starts = (padded.cumsum(0) - padded).tolist()
            self.used = self.starts[-1] + int(padded[-1])
            rows = sum(self.counts) + len(self.counts) * tile
            step = max(tile, 1 << max(0, rows.bit_length() - 4))
            self.room = -(-rows // step) * step

    def spread(self, x: Tensor) -> Tensor:
        """Pad rows: [T, H] -> [R, H]."""
        if not self.apart:
            return x
        out = x.new_empty(self.room, x.shape[1])
        ends = [*self.starts[1:], self.used]
        for rows, start, end in zip(x.split(self.counts), self.starts, ends, strict=True):
            out[start : start + len(rows)] = rows
            out[start + len(rows) : end] = 0
        return out

    def collect(self, x: Tensor) -> Tensor:
        """Remove the padding: [R, H] -> [T, H]."""
        if not self.apart:
            return x
        places = zip(self.starts, self.counts, strict=True)
        return torch.cat([x[start : start + count] for start, count in places])


class _FeedForward(torch.autograd.Function):
    """``feed_forward``: one grouped product per matrix, and two for its gradients.

    It saves ``x`` and ``W1 x``; the backward pass recomputes the second product's input together
    with the gradient of the activation. It has its own backward pass because that of ``grouped_mm``
    does not accept the strided gradients it gets from autograd, and because with ``fuse`` a
    weight's gradient is added directly to Megatron's buffer.
    """

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        x: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        counts: Tensor,
        fuse: bool,
        tile: int,
        held: tuple[Held | None, Held | None],
    ) -> Tensor:
        tiles = _Tiles(counts, tile, x.device)
        x = tiles.spread(x)
        # Kept as they are: saved tensors come back as other objects, without `main_grad`.
        ctx.parameters = [w if fuse and hasattr(w, "main_grad") else None for w in (fc1, fc2)]
        ctx.learn = [None if one is None else one[1] for one in held]
        fc1, fc2 = arranged(fc1, held[0]), arranged(fc2, held[1])
        gate_up = grouped_mm(x, fc1.transpose(1, 2), offs=tiles.ends)
        ctx.save_for_backward(x, gate_up, fc1, fc2)
        ctx.tiles = tiles
        inner = swiglu.activate(gate_up, tiles.used)
        return tiles.collect(grouped_mm(inner, fc2.transpose(1, 2), offs=tiles.ends))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gate_up, fc1, fc2 = ctx.saved_tensors
        tiles, ends = ctx.tiles, ctx.tiles.ends
        # grouped_mm rejects the strides of an empty tensor.
        grad = tiles.spread(grad.contiguous() if len(grad) else grad.new_empty(grad.shape))
        inner = x.new_empty(len(x), fc2.shape[2])
        grad_inner = grouped_mm(grad, fc2, offs=ends)
        grad_gate_up = swiglu.gradient(gate_up, grad_inner, tiles.used, again=inner)
        grad_fc1 = grad_fc2 = None
        if ctx.needs_input_grad[1]:  # not frozen
            grad_fc1 = _weight_gradient(ctx.parameters[0], grad_gate_up, x, ends, ctx.learn[0])
        if ctx.needs_input_grad[2]:
            grad_fc2 = _weight_gradient(ctx.parameters[1], grad, inner, ends, ctx.learn[1])
        grad_x = tiles.collect(grouped_mm(grad_gate_up, fc1, offs=ends))
        return grad_x, grad_fc1, grad_fc2, None, None, None, None


def _weight_gradient(
    weights: Any, grad: Tensor, x: Tensor, ends: Tensor, learn: Sequence[int] | None
) -> Tensor:
    """``grad_e^T x_e`` of every trainable expert, added to ``weights.main_grad`` if there are
    ``weights``.

    Returns:
        The gradient; if it was added, an uninitialised tensor, which autograd requires and
        Megatron's hook drops.
    """
    if weights is None and learn is None:
        return grouped_mm(grad.t(), x, offs=ends)
    if learn is None and not (grad.device.type == "cpu" and grad.dtype == weights.main_grad.dtype):
        weights.main_grad.add_(grouped_mm(grad.t(), x, offs=ends))
    else:
        bounds = [0, *ends.tolist()]
        experts = range(len(ends)) if learn is None else learn
        spans = [slice(bounds[expert], bounds[expert + 1]) for expert in experts]
        if weights is None:
            return torch.stack([grad[span].t() @ x[span] for span in spans])
        for target, span in zip(weights.main_grad, spans, strict=True):
            if grad.dtype == target.dtype:
                target.addmm_(grad[span].t(), x[span])
            else:
                target.add_(grad[span].t() @ x[span])
    weights.grad_added_to_main_grad = True
    return torch.empty_like(weights)
