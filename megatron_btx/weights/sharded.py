"""The sink for a live model: every rank makes the shards it holds, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.weights.box import Box, Shape, extent, slabs
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.megatron import stored
from megatron_btx.weights.plan import Plan

logger = logging.getLogger(__name__)

_SLAB = 1 << 24
"""Elements made at a time: what a rank holds beyond its own shards."""


@torch.no_grad()
def load_into_sharded(plan: Plan, sharded_state_dict: Mapping[str, Any]) -> dict[str, int]:
    """Fill a live Megatron module's shards in place from a plan over canonical names.

    No communication: each rank evaluates exactly the slices that it holds, under any TP x PP x EP
    x ETP. A value is rounded once, to its parameter's dtype. Rows of vocabulary padding are zero.

    Args:
        plan: over canonical names, e.g. of :func:`megatron_btx.mix.btx`.
        sharded_state_dict: of the module (``module.sharded_state_dict()``): Megatron
            ``ShardedTensor``s whose data are, or are views of, the live parameters, and factories
            of such. Objects that are not tensors (``_extra_state``) are left alone.

    Returns:
        Bytes that this call read from each source.

    Raises:
        UserErrors: a shard that the plan has no tensor for or another shape of; nothing has been
            written then. Or files of a source were written to while they were read.
    """
    before = plan.bytes_read
    cache: dict[tuple[str, Shape, torch.dtype], Expression] = {}
    work, errors = [], []
    for shard in _shards(sharded_state_dict):
        key = (shard.key, tuple(shard.global_shape), shard.data.dtype)
        try:
            if key not in cache:
                cache[key] = stored(shard.key, key[1], plan.targets).to(key[2])
        except KeyError as error:
            what = f"the module needs {shard.key}, the plan makes no {error.args[0]}"
            errors.append(UserError("weights", what))
            continue
        if cache[key].shape != key[1]:
            what = f"{shard.key}: the module has {key[1]}, the plan {cache[key].shape}"
            errors.append(UserError("weights", what, "mix models of the module's shape"))
            continue
        work.append((cache[key], _global_box(shard), shard.data, shard.prepend_axis_num))
    if errors:
        raise UserErrors(errors)
    for expression, box, data, prepended in work:
        _fill(plan, expression, box, data, prepended)
    plan.check_unchanged()
    return {label: count - before[label] for label, count in plan.bytes_read.items()}


def _fill(plan: Plan, expression: Expression, box: Box, data: Tensor, prepended: int) -> None:
    """Evaluate ``box`` slab by slab into ``data``, which lacks the first ``prepended`` axes."""
    for slab in slabs(box, _SLAB):
        part = tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(slab, box, strict=True))
        value = expression.evaluate(slab, plan.read)
        data[part[prepended:]].copy_(value.reshape(extent(slab)[prepended:]))


def _global_box(shard: Any) -> Box:
    local = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    return tuple((o, o + n) for o, n in zip(shard.global_offset, local, strict=True))


def _shards(entry: Any) -> Iterator[Any]:
    """Every ShardedTensor below ``entry``, factories built.

    Megatron's classes are told apart by what they have, so that this room needs no Megatron.
    """
    if isinstance(entry, Mapping):
        entry = list(entry.values())
    if isinstance(entry, (list, tuple)):
        for one in entry:
            yield from _shards(one)
    elif hasattr(entry, "build_fn"):
        built = list(_shards(entry.build()))
        owner = entry.data.untyped_storage().data_ptr()
        for shard in built:
            if shard.data.untyped_storage().data_ptr() != owner:
                raise RuntimeError(f"{entry.key}: its factory copies, so it cannot be filled")
        yield from built
    elif hasattr(entry, "local_shape"):
        if entry.data is None:
            raise RuntimeError(f"{entry.key}: no data to fill")
        yield entry
    elif isinstance(entry, Tensor):
        raise RuntimeError("a plain tensor among sharded ones: its place in the model is not known")
