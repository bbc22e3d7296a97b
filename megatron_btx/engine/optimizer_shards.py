"""The distributed optimizer's state as every rank saves it: what it holds itself, and no more.

Megatron's ``fully_reshardable`` form, which any layout loads, gathers the state to one rank (on
GPUs to every rank) before it is written. What is stored here is that form, with other chunks: a
rank's part of a parameter is a range of its elements in row-major order, which is at most
``2 n - 1`` boxes in ``n`` dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and extent."""

FORM = "fully_reshardable"
"""Megatron's name of what is stored."""


def sharded_state(
    optimizer: MegatronOptimizer, model_part: dict[str, Any], metadata: dict[str, Any]
) -> dict[str, Any]:
    """An optimizer's sharded state dict, to be saved. Every rank calls it.

    Args:
        optimizer: as ``get_megatron_optimizer`` makes it.
        model_part: sharded state dict of its model.
        metadata: as Megatron's ``sharded_state_dict`` takes it.
    """
    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else []
    each = chained or [optimizer]
    parts = _parts_of_all(each, model_part) if all(map(_lies_whole, each)) else None
    if parts is None:
        return optimizer.sharded_state_dict(  # type: ignore[no-any-return]
            model_part, is_loading=False, metadata=metadata
        )
    if len(each) == 1:
        return _of_one(each[0], parts)
    optimizer._synchronize_steps()
    return {number: _of_one(one, parts) for number, one in enumerate(each)}  # type: ignore[misc]


def _lies_whole(optimizer: MegatronOptimizer) -> bool:
    """Whether it is a distributed one whose state, in fp32, lies on this rank and its like once."""
    return (
        isinstance(optimizer, DistributedOptimizer)
        and not optimizer.is_stub_optimizer
        and not optimizer.config.use_precision_aware_optimizer
        and not optimizer.config.optimizer_cpu_offload
        and optimizer.ddp_config.num_distributed_optimizer_instances == 1
    )


def _parts_of_all(
    each: Sequence[DistributedOptimizer], model_part: dict[str, Any]
) -> dict[Tensor, list[ShardedTensor]] | None:
    """The parts of every parameter, also of those whose state others hold: all ranks that share one
    so decide alike. ``None``: some parameter is not stored as boxes of itself."""
    entries = {entry.data: entry for entry in nested_values(model_part)}
    found: dict[Tensor, list[ShardedTensor]] = {}
    for parameter in (p for one in each for buffer in one.buffers for p in buffer.params):
        entry = entries.get(parameter)
        parts = None if entry is None else _parts(entry, parameter.shape)
        if parts is None:
            return None
        found[parameter] = parts
    return found


def _of_one(
    optimizer: DistributedOptimizer, parts: dict[Tensor, list[ShardedTensor]]
) -> dict[str, Any]:
    shards = list(_shards(optimizer, parts))
    return {
        **optimizer.state_dict(),
        "param_state": dict(enumerate(shards)),
        "param_state_sharding_type": FORM,
    }


def _shards(
    optimizer: DistributedOptimizer, parts: dict[Tensor, list[ShardedTensor]]
) -> Iterator[ShardedTensor]:
    keys = ("param", *getattr(optimizer, "optimizer_state_keys", ("exp_avg", "exp_avg_sq")))
    for buffer in optimizer.gbuf_ranges:
        for bucket in (bucket for buckets in buffer.values() for bucket in buckets):
            for parameter, ranges in bucket["param_map"].items():
                held = optimizer._get_main_param_and_optimizer_states(parameter)
                start = ranges["param"].start
                for key in keys:
                    prefix, state = f"optimizer.state.{key}.", held[key].detach()
                    yield from _boxed(prefix, parts[parameter], state, start)


def _parts(entry: Any, shape: torch.Size) -> list[ShardedTensor] | None:
    """Megatron's shards of a parameter that are not another rank's too, as views of one tensor of
    no bytes that is laid out like it; ``None``: some shard is no such view."""
    whole = torch.empty(shape, device="meta")
    if isinstance(entry, ShardedTensorFactory):
        found = list(nested_values([dataclasses.replace(entry, data=whole).build()]))
    else:
        found = [dataclasses.replace(entry, data=whole, dtype=whole.dtype)]
    storage = whole.untyped_storage()._cdata
    if not all(p.data.untyped_storage()._cdata == storage and _is_ordered(p.data) for p in found):
        return None
    # The last number of a replica counts the ranks that share the state.
    return [part for part in found if not any(part.replica_id[:-1])]


def _is_ordered(view: Tensor) -> bool:
    """Whether the elements of a view lie in row-major order."""
    steps = list(zip(view.shape, view.stride(), strict=True))
    return all(
        stride > sum((size - 1) * step for size, step in steps[at + 1 :])
        for at, (_, stride) in enumerate(steps)
    )


def _boxed(
    prefix: str, parts: list[ShardedTensor], held: Tensor, start: int
) -> Iterator[ShardedTensor]:
    """What a rank holds of a parameter: ``held`` [n], its elements from ``start`` on."""
    for part in parts:
        view, before = part.data, (1,) * part.prepend_axis_num
        first, last = (_count_below(view, at) for at in (start, start + held.numel()))
        for offset, extent in boxes(tuple(view.shape), first, last):
            at = view.storage_offset() - start
            at += sum(o * step for o, step in zip(offset, view.stride(), strict=True))
            data = held.as_strided(extent, view.stride(), held.storage_offset() + at)
            within = (*(0 for _ in before), *offset)
            yield ShardedTensor(
                prefix + part.key,
                data[(None,) * len(before)],
                held.dtype,
                (*before, *extent),
                part.global_shape,
                tuple(a + b for a, b in zip(part.global_offset, within, strict=True)),
                None,  # of no regular grid
                allow_shape_mismatch=part.allow_shape_mismatch,
            )


def _count_below(view: Tensor, position: int) -> int:
    """How many elements of an ordered view lie before a position of its storage."""
    left, count = position - view.storage_offset(), 0
    inner = view.numel()
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if left <= 0:
            break
        inner //= size
        rows = min(left // stride, size)
        count += rows * inner
        if rows == size:
            return count
        left -= rows * stride
    return count + (left > 0)


def boxes(shape: tuple[int, ...], first: int, last: int) -> Iterator[Box]:
    """The boxes that elements ``first`` to ``last`` (without it), in row-major order, make up."""
    if first >= last:
        return
    if len(shape) <= 1:
        yield ((first,), (last - first,)) if shape else ((), ())
        return
    row = prod(shape[1:])
    begin, end = -(-first // row), last // row  # whole rows
    if begin > end:  # within one row
        yield from _in_row(shape, end, first - end * row, last - end * row)
        return
    yield from _in_row(shape, begin - 1, first - (begin - 1) * row, row if first % row else 0)
    if end > begin:
        rest = shape[1:]
        yield (begin, *(0 for _ in rest)), (end - begin, *rest)
    yield from _in_row(shape, end, 0, last - end * row)


def _in_row(shape: tuple[int, ...], row: int, first: int, last: int) -> Iterator[Box]:
    for offset, extent in boxes(shape[1:], first, last):
        yield (row, *offset), (1, *extent)
