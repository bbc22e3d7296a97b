"""The sink for a live model: every rank makes the shards it holds, or its share of them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

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


class Replicas(Protocol):
    """Ranks that hold the same shard, as one of them sees them."""

    @property
    def rank(self) -> int:
        """This one's number among them."""

    @property
    def size(self) -> int:
        """How many they are."""

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Replace ``tensor`` by that of rank ``source`` of them; every one of them calls it."""


@dataclass(frozen=True, slots=True)
class _Alone:
    rank: int = 0
    size: int = 1

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Nobody to tell."""


ALONE = _Alone()


@dataclass(frozen=True, slots=True)
class Slab:
    """What one rank makes at a time of what it and its replicas hold."""

    key: str
    """Of the stored tensor."""
    box: Box
    """Of that."""
    read: Mapping[str, int]
    """Bytes of each source that it is made of."""


@dataclass(frozen=True, slots=True)
class _Shard:
    """What a rank has to fill."""

    key: str
    expression: Expression
    box: Box
    data: Tensor
    prepended: int
    """Axes at the front that ``data`` lacks."""


@torch.no_grad()
def load_into_sharded(
    plan: Plan,
    sharded_state_dict: Mapping[str, Any],
    replicas: Callable[[Any], Replicas] = lambda _shard: ALONE,
) -> dict[str, int]:
    """Fill a live Megatron module's shards in place from a plan over canonical names.

    Each rank evaluates slices that it holds, under any TP x PP x EP x ETP: all of them, without
    communication, or, of what ``replicas`` says other ranks hold too, its share. A value is rounded
    once, to its parameter's dtype. Rows of vocabulary padding are zero.

    Args:
        plan: over canonical names, e.g. of :func:`megatron_btx.mix.btx`.
        sharded_state_dict: of the module (``module.sharded_state_dict()``): Megatron
            ``ShardedTensor``s whose data are, or are views of, the live parameters, and factories
            of such. Objects that are not tensors (``_extra_state``) are left alone.
        replicas: of a shard, the ranks that hold the same. All of them call this function, with
            their shards in the same order.

    Returns:
        Bytes that this call read from each source.

    Raises:
        UserErrors: a shard that the plan has no tensor for or another shape of; nothing has been
            written then. Or files of a source were written to while they were read.
    """
    before = plan.bytes_read
    for group, mine in _work(plan, sharded_state_dict, replicas).items():
        _fill(plan, mine, group)
    plan.check_unchanged()
    return {label: count - before[label] for label, count in plan.bytes_read.items()}


def slabs_to_make(
    plan: Plan,
    sharded_state_dict: Mapping[str, Any],
    replicas: Callable[[Any], Replicas] = lambda _shard: ALONE,
) -> dict[Replicas, list[Slab]]:
    """What :func:`load_into_sharded` would do, of which nothing is done.

    Returns:
        By group of replicas all slabs in the order in which they are shared out: of ``n`` of them
        number ``r`` makes every ``n``-th, from its ``r``-th on.

    Raises:
        UserErrors: as it.
    """
    return {
        group: [
            Slab(one.key, slab, plan.bytes_to_read(one.expression, slab))
            for one, slab in _in_order(mine)
        ]
        for group, mine in _work(plan, sharded_state_dict, replicas).items()
    }


def _work(
    plan: Plan, sharded_state_dict: Mapping[str, Any], replicas: Callable[[Any], Replicas]
) -> dict[Replicas, list[_Shard]]:
    """The shards that a rank has to fill, by who holds them too."""
    cache: dict[tuple[str, Shape, torch.dtype], Expression] = {}
    work: dict[Replicas, list[_Shard]] = {}
    errors = []
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
        one = _Shard(shard.key, cache[key], _global_box(shard), shard.data, shard.prepend_axis_num)
        work.setdefault(replicas(shard), []).append(one)
    if errors:
        raise UserErrors(errors)
    return work


def _in_order(shards: Iterable[_Shard]) -> Iterator[tuple[_Shard, Box]]:
    return ((shard, slab) for shard in shards for slab in slabs(shard.box, _SLAB))


def _fill(plan: Plan, shards: Iterable[_Shard], replicas: Replicas) -> None:
    """Evaluate the shards slab by slab, as many at a time as there are replicas: each of them makes
    one, and tells the others."""
    left = _in_order(shards)
    while window := list(itertools.islice(left, replicas.size)):
        if replicas.rank < len(window):
            shard, slab = window[replicas.rank]
            value = shard.expression.evaluate(slab, plan.read)
            _part(shard, slab).copy_(value.reshape(extent(slab)[shard.prepended :]))
        for source, (shard, slab) in enumerate(window):
            part = _part(shard, slab)
            whole = part.contiguous()
            replicas.broadcast(whole, source)
            if whole is not part and source != replicas.rank:
                part.copy_(whole)


def _part(shard: _Shard, slab: Box) -> Tensor:
    """Where a slab of a shard lies in its data."""
    cut = tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(slab, shard.box, strict=True))
    return shard.data[cut[shard.prepended :]]


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
