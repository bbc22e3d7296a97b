"""Ranks of a job that is not there, one after another in this process: Megatron's own process
groups over torch's fake backend, the real modules on its ``meta`` device. Nothing is computed, sent
or read, and no weight has a byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_btx.engine import cpu, mcore_patches, platform
from megatron_btx.engine.checkpoint import model_sharded_state_dict
from megatron_btx.engine.initializer import slabs_of
from megatron_btx.engine.model import build_model
from megatron_btx.errors import UserError
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Layout, Training
from megatron_btx.weights.plan import Plan
from megatron_btx.weights.write_sharded_model import Slab

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
    to_make: tuple[tuple[int, int, tuple[Slab, ...]], ...]
    """What the initializer shares out: this rank's number among the replicas of some of its shards,
    how many they are, and the slabs of these."""

    def read(self) -> dict[str, int]:
        """Bytes of each source that the rank reads itself."""
        found: dict[str, int] = {}
        for number, count, slabs in self.to_make:
            for slab in slabs[number::count]:
                for source, size in slab.read.items():
                    found[source] = found.get(source, 0) + size
        return found


@contextmanager
def rank(layout: Layout, number: int) -> Iterator[None]:
    """Within it this process is one rank of a job, with Megatron's groups.

    Raises:
        UserError: this machine has a GPU, whose kernels' modules were not tried this way.
    """
    if torch.cuda.is_available():
        what = "simulated ranks were only tried where torch sees no GPU"
        raise UserError("this machine", what, "hide them: CUDA_VISIBLE_DEVICES=")
    cpu.install()
    mcore_patches.install(platform.detect())
    device, new_group = torch.cuda.current_device, dist.new_group

    def fake_group(*ranks: Any, backend: object = None, **more: Any) -> Any:
        return new_group(*ranks, **more)  # its groups over gloo as well

    dist.init_process_group("fake", store=FakeStore(), rank=number, world_size=layout.world_size)
    type_of: Any = torch.Tensor.type

    def plain_type(tensor: torch.Tensor, *given: Any, **more: Any) -> Any:
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
        torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore
        yield
    finally:
        torch.cuda.current_device, dist.new_group = device, new_group
        torch.Tensor.type = type_of  # type: ignore[method-assign]
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def held(
    architecture: Architecture, training: Training, number: int, plan: Plan | None = None
) -> Held:
    """What a rank holds.

    Args:
        architecture: of the model.
        training: layout, precision and Megatron's options.
        number: of the rank.
        plan: of the weights that it begins with; its sources are not read.
    """
    with rank(training.layout, number):
        model = simulated_model(architecture, training)
        counts = [0, 0]
        for name, parameter in model.named_parameters():
            assert parameter.is_meta
            counts[".mlp.experts." in name] += parameter.numel()
        pieces = []
        for entry in model_sharded_state_dict(model).values():
            built = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            pieces += [_piece(one) for one in built if isinstance(one, ShardedTensor)]
        to_make = [] if plan is None else slabs_of(model, plan).items()
        return Held(
            parallel_state.get_pipeline_model_parallel_rank(),
            (counts[0], counts[1]),
            tuple(pieces),
            tuple((group.rank, group.size, tuple(slabs)) for group, slabs in to_make),
        )


def simulated_model(architecture: Architecture, training: Training) -> Any:
    """The part of a model that the :func:`rank` of the moment holds."""
    options = training.megatron
    return build_model(architecture, training.layout, training.precision, options=options)


def optimizer_bytes(optimizer: MegatronOptimizer, training: Training) -> int:
    """Bytes of a rank's optimizer state: two moments and in bf16 the master weights, in fp32."""
    own = sum(
        parameter.numel()
        for one in getattr(optimizer, "chained_optimizers", [optimizer])
        for group in one.optimizer.param_groups
        for parameter in group["params"]
    )
    return own * (8 if training.precision == "fp32" else 12)


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
