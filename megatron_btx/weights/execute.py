"""The executor: expressions as bytes, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_btx.weights.box import Box, slabs, whole
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.plan import Plan

SLAB = 32 << 20
"""Bytes of a target that are made at a time, unless a caller asks otherwise."""


@torch.no_grad()
def stream(
    plan: Plan, target: Expression, slab: int = SLAB, box: Box | None = None
) -> Iterator[memoryview]:
    """The bytes of ``target``, or of a box of it, in row-major order, ``slab`` at a time.

    Args:
        plan: whose sources the expression reads.
        target: what to make.
        slab: bytes made at a time.
        box: ``None``: the whole.
    """
    elements = max(1, slab // target.dtype.itemsize)
    for part in slabs(whole(target.shape) if box is None else box, elements):
        yield as_bytes(target.evaluate(part, plan.read))


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, little-endian, uncopied where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
