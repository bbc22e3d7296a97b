"""The executor: a plan's targets as bytes, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_btx.weights.box import slabs, whole
from megatron_btx.weights.plan import Plan

SLAB = 32 << 20
"""Bytes of a target that are made at a time, unless a caller asks otherwise."""


@torch.no_grad()
def stream(plan: Plan, name: str, slab: int = SLAB) -> Iterator[memoryview]:
    """The bytes of one target in row-major order, little-endian, ``slab`` at a time."""
    target = plan.targets[name]
    for box in slabs(whole(target.shape), max(1, slab // target.dtype.itemsize)):
        yield as_bytes(target.evaluate(box, plan.read))


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, uncopied where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
