"""Replicated parameters must stay bit-identical; a layout bug that lets them drift is silent."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_btx.engine.checkpoint import model_sharded_state_dict


class ReplicaDrift(RuntimeError):
    """Two ranks hold different bits for what should be one tensor."""


def check_replicas(model: torch.nn.Module, step: int) -> None:
    """Hash every shard by its global place and compare across all ranks. Every rank calls it.

    Raises:
        ReplicaDrift: naming the first tensors whose replicas differ; on every rank.
    """
    hashes = {place: _hash(data) for place, data in _shards(model)}
    everywhere: list[dict[tuple, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, hashes)
    seen: dict[tuple, set[str]] = defaultdict(set)
    for rank in everywhere:
        for place, digest in rank.items():
            seen[place].add(digest)
    drifted = sorted({place[0] for place, digests in seen.items() if len(digests) > 1})
    if drifted:
        raise ReplicaDrift(
            f"after step {step} replicas of {len(drifted)} tensor(s) differ between ranks, "
            f"first {drifted[0]}: the layout is computed wrongly or memory is failing; "
            "the last checkpoint is from before this check"
        )


def _shards(model: torch.nn.Module) -> list[tuple[tuple, torch.Tensor]]:
    found = []
    for entry in model_sharded_state_dict(model).values():
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            if isinstance(part, ShardedTensor):
                found.append(((part.key, *part.global_offset), part.data))
    return found


def _hash(data: torch.Tensor) -> str:
    flat = data.detach().contiguous().view(-1).view(torch.uint8).cpu()
    return hashlib.blake2b(flat.numpy().data, digest_size=16).hexdigest()
