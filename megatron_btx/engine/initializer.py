"""Weights of a live, sharded model from a plan: the BTX initializer.

The finetuning job starts from N dense checkpoints, each saved under whatever layout. Every rank
evaluates the plan for the shards it holds: it reads the FFN tensors of its own experts only, and of
everything else the slices that it averages, accumulated in fp64 and rounded once. What ranks hold
alike because of data parallelism they share out, so that no byte is read twice because of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_btx.engine.checkpoint import model_sharded_state_dict
from megatron_btx.engine.checkpoint_hashes import check_hashes
from megatron_btx.weights.plan import Plan
from megatron_btx.weights.write_sharded_model import (
    Replicas,
    Slab,
    load_into_sharded,
    slabs_to_make,
)


def initialize(model: torch.nn.Module, plan: Plan) -> dict[str, int]:
    """Set the weights of this rank's part of a model. Before the optimizer is built: its master
    weights are copies of what the model then holds.

    Returns:
        Bytes that this rank read from each source.

    Raises:
        UserErrors: model and plan disagree, and nothing has been written. Or files of a source
            were changed while they were read, or since they were written.
    """
    read = load_into_sharded(plan, model_sharded_state_dict(model), _replicas(model))
    for directory, names in plan.files().items():
        check_hashes(directory, names)
    return read


def slabs_of(model: torch.nn.Module, plan: Plan) -> dict[Replicas, list[Slab]]:
    """What this rank and its replicas would make and read in :func:`initialize`, shared out as
    there. The model may be on the ``meta`` device."""
    return slabs_to_make(plan, model_sharded_state_dict(model), _replicas(model))


def _replicas(model: torch.nn.Module) -> Callable[[Any], Replicas]:
    """Of a shard of the model, the ranks that hold the same."""
    experts = {
        _storage(parameter)
        for parameter in model.parameters()
        if not getattr(parameter, "allreduce", True)  # Megatron's mark of what DDP keeps apart
    }
    dense = _Replicas(parallel_state.get_data_parallel_group(with_context_parallel=True))
    expert = _Replicas(parallel_state.get_expert_data_parallel_group())
    return lambda shard: expert if _storage(shard.data) in experts else dense


def _storage(tensor: torch.Tensor) -> int:
    """What a tensor and its views have in common, on the ``meta`` device too (where all data lie at
    zero)."""
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True)
class _Replicas:
    """A group of Megatron's whose ranks hold the same parameters."""

    group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        """This process's."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Of the group."""
        return dist.get_world_size(self.group)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """From rank ``source`` of the group to all others."""
        if self.size > 1:
            dist.broadcast(tensor, dist.get_global_rank(self.group, source), group=self.group)
