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
from megatron_btx.recipe.schema import Layout, Training

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
    device, new_group = torch.cuda.current_device, dist.new_group

    def fake_group(*ranks: object, backend: object = None, **more: object) -> object:
        return new_group(*ranks, **more)  # its groups over gloo as well

    dist.init_process_group("fake", store=FakeStore(), rank=number, world_size=layout.world_size)
    type_of = torch.Tensor.type

    def plain_type(tensor: torch.Tensor, *given: object, **more: object) -> object:
        found = type_of(tensor, *given, **more)  # Megatron's optimizers ask for torch.FloatTensor
        return found.replace("torch.meta.", "torch.") if isinstance(found, str) else found

    try:
        dist.new_group, torch.Tensor.type = fake_group, plain_type  # type: ignore[assignment]
        parallel_state.initialize_model_parallel(
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            layout.virtual_pipeline_model_parallel_size,
            expert_model_parallel_size=layout.expert_model_parallel_size,
            expert_tensor_parallel_size=layout.etp,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment]
        yield
    finally:
        torch.cuda.current_device, dist.new_group = device, new_group
        torch.Tensor.type = type_of  # type: ignore[method-assign]
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


def trained(architecture: Architecture, training: Training, number: int) -> tuple[int, int]:
    """Bytes of gradient buffers, and of optimizer state, of a rank."""
    from megatron_btx.engine.model import build_model, chunks, wrap_ddp
    from megatron_btx.engine.optimizer import build_optimizer

    with rank(training.layout, number):
        model = build_model(architecture, training.layout, training.precision)
        ddp = wrap_ddp(model, use_distributed_optimizer=training.use_distributed_optimizer)
        gradients = sum(
            buffer.grad_data.nbytes
            for piece in chunks(ddp)
            for buffer in (*piece.buffers, *piece.expert_parallel_buffers)
        )
        own = sum(
            parameter.numel()
            for one in build_optimizer(ddp, training).chained_optimizers
            for group in one.optimizer.param_groups
            for parameter in group["params"]
        )
    return gradients, own * (8 if training.precision == "fp32" else 12)  # two moments, a master


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
