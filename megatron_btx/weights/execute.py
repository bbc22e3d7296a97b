"""The executor: expressions as bytes, in bounded memory; what is not finite is found on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_btx.errors import UserError
from megatron_btx.weights.box import Box, slabs, whole
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.ops import takes
from megatron_btx.weights.plan import Plan

SLAB = 32 << 20


@dataclass(frozen=True)
class Execution:
    """How a plan is carried out. Nothing here changes a bit of the result.

    Args:
        slab: bytes of a target made at a time.
        workers: files written side by side.
        advance: called with the number of bytes just written, from any worker.
    """

    slab: int = SLAB
    workers: int = 1
    advance: Callable[[int], None] = lambda _count: None

    @torch.no_grad()
    def stream(
        self, plan: Plan, target: Expression, errors: list[UserError], box: Box | None = None
    ) -> Iterator[memoryview]:
        """The bytes of ``target``, or of a box of it, in row-major order, a slab at a time.

        Where something is NaN or infinite, ``errors`` gets the sources that hold it.
        """
        target = plan.resolved(target)
        elements = max(1, self.slab // target.dtype.itemsize)
        finite = True
        for part in slabs(whole(target.shape) if box is None else box, elements):
            values = target.evaluate(part, plan.read_stored)
            finite = finite and all_finite(values)
            data = as_bytes(values)
            yield data
            self.advance(len(data))
        if not finite:
            errors += _not_finite(plan, target, elements)


ONE_BY_ONE = Execution()
"""One file after the other, without progress."""


def all_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite. The extremes show it (a NaN is both of them) at a
    twentieth of the cost of looking at each."""
    return all(bool(extreme.isfinite()) for extreme in values.aminmax())


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, little-endian, uncopied where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _not_finite(plan: Plan, target: Expression, elements: int) -> list[UserError]:
    """Which of the source tensors that a target is made of are not finite."""
    fix = "train on, or mix, another checkpoint of it"
    errors = []
    for take in dict.fromkeys(takes(target)):
        parts = slabs(whole(take.shape), elements)
        if not all(all_finite(take.evaluate(part, plan.read_stored)) for part in parts):
            errors.append(UserError(take.source, f"tensor {take.name} holds NaN or infinity", fix))
    what = f"{target} overflows {str(target.dtype).removeprefix('torch.')}"
    return errors or [UserError("the plan's result", what, "choose a wider dtype")]
