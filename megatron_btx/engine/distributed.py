"""Process groups from a recipe's layout."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist

from megatron_btx.engine import cpu, mcore_patches, platform
from megatron_btx.errors import UserError
from megatron_btx.recipe import check
from megatron_btx.recipe.schema import Layout


def initialize(layout: Layout, random_seed: int) -> None:
    """Join the job's ranks and lay Megatron's process groups over them.

    The rendezvous is ``BTX_INIT_METHOD`` where a launcher of ours sets it (of several ranks a file,
    so that no port is raced for), else torch's environment variables. Calling it again lays new
    groups over the same ranks.

    Args:
        layout: how the ranks divide the model; ``layout.world_size`` ranks must have been started.
        random_seed: seeds Megatron's RNG tracker (dropout, nothing else of ours).

    Raises:
        UserError: the number of ranks does not fit the layout, or the layout cannot run here, or
            Megatron-Core is of a release that is not supported.
    """
    cpu.install()
    mcore_patches.install(platform.detect())
    from megatron.core import parallel_state, tensor_parallel

    from megatron_btx.engine.moe import loss_tracker

    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != layout.world_size:
        raise UserError(
            "layout",
            f"TP x PP x CP x DP is {layout.world_size} ranks, but {started} were started",
            "start as many ranks as the layout has, or change the layout",
        )
    cuda = torch.cuda.is_available()
    if not cuda:
        _refuse_idle_gpus()
        check.refuse_on_gloo(layout)
    if not dist.is_initialized():
        if cuda:
            # All GPUs of a node are seen, or (srun --gpu-bind) this rank's alone.
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        else:
            torch.set_num_threads(layout.num_threads)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=os.environ.get("BTX_INIT_METHOD", "env://"),
            rank=int(os.environ.get("RANK", "0")),
            world_size=started,
            timeout=datetime.timedelta(minutes=30),
        )
    parallel_state.destroy_model_parallel()
    loss_tracker.forget()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.etp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(random_seed, force_reset_rng=True)


def is_first_rank() -> bool:
    """Whether this rank writes what one rank writes (logs, manifests)."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first_rank(value: Any) -> Any:
    """The first rank's value on every rank, for what only its view of the disk can decide."""
    values = [value]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def summed(number: int) -> int:
    """The sum of ``number`` over all ranks, on every rank."""
    if not dist.is_initialized():
        return number
    numbers = [0] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return sum(numbers)


def shutdown() -> None:
    """Leave the job's process groups, where they exist."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _refuse_idle_gpus() -> None:
    """That Slurm gave this job no GPUs, where torch finds none.

    Raises:
        UserError: it did: the CPU would do the work, and nobody would notice for hours.
    """
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE") or "0")
    if gpus:
        raise UserError(
            "slurm.gpus_per_node",
            f"this node's {gpus} GPU(s) are the job's, and torch {torch.__version__} sees none",
            "install a torch with CUDA; show a container the GPUs (`apptainer exec --nv`); "
            "or ask for none",
        )
