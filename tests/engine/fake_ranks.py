"""Ranks of a job that is not there, one after another in this process: Megatron's own process
groups over torch's fake backend, the real modules on its meta device. Nothing is computed or sent,
and no weight has a byte."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_btx.engine import mcore_patches, platform
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Layout

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and extent in a global tensor."""


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a global tensor."""

    key: str
    shape: tuple[int, ...]
    box: Box
    nbytes: int
    is_written: bool
    """Whether a checkpoint has it from this rank."""


@dataclass(frozen=True)
class Held:
    """What a rank holds of a model."""

    stage: int
    """Of the pipeline."""
    parameters: tuple[int, int]
    """As ``recipe.memory.rank_parameters`` counts them: of all but the experts, of those."""
    pieces: tuple[Piece, ...]


@contextmanager
def rank(layout: Layout, number: int) -> Iterator[None]:
    """Within it this process is one rank of a job, with Megatron's groups."""
    mcore_patches.install(platform.detect())
    device = torch.cuda.current_device
    dist.init_process_group("fake", store=FakeStore(), rank=number, world_size=layout.world_size)
    try:
        parallel_state.initialize_model_parallel(
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            layout.virtual_pipeline_model_parallel_size,
            expert_model_parallel_size=layout.expert_model_parallel_size,
            expert_tensor_parallel_size=layout.etp,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment]
        yield
    finally:
        torch.cuda.current_device = device
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def held(architecture: Architecture, layout: Layout, number: int) -> Held:
    """What a rank of the layout holds."""
    from megatron_btx.engine.checkpoint import model_sharded_state_dict
    from megatron_btx.engine.model import build_model

    with rank(layout, number):
        model = build_model(architecture, layout, "bf16")
        counts = [0, 0]
        for name, parameter in model.named_parameters():
            assert parameter.is_meta
            counts[".mlp.experts." not in name] += parameter.numel()
        pieces = []
        for entry in model_sharded_state_dict(model).values():
            built = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            pieces += [_piece(one) for one in built if isinstance(one, ShardedTensor)]
        stage = parallel_state.get_pipeline_model_parallel_rank()
    return Held(stage, (counts[1], counts[0]), tuple(pieces))


def _piece(shard: ShardedTensor) -> Piece:
    extent = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    replica = shard.replica_id if isinstance(shard.replica_id, tuple) else (shard.replica_id,)
    return Piece(
        shard.key,
        tuple(shard.global_shape),
        (tuple(shard.global_offset), extent),
        shard.data.nbytes,
        not any(replica),
    )
