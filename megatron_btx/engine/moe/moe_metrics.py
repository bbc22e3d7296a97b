"""The balance losses of the step just done, for the log."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_btx.engine.moe import loss_tracker
from megatron_btx.engine.moe.router import BALANCE_LOSS

_LOGGED_AS = {BALANCE_LOSS: "balance_loss", "z_loss": "router_z_loss"}


def pop_balance_loss(num_microbatches: int) -> dict[str, float]:
    """Every auxiliary loss in Megatron's tracker, divided by its coefficient: mean over layers,
    micro-batches and ranks. Empties the tracker. Every rank calls it; empty for a dense model.

    Megatron's own reduction averages by an operation that gloo does not have.
    """
    losses = {}
    for name, entry in loss_tracker.tracked().items():
        values = entry.values.clone()
        dist.all_reduce(values, group=parallel_state.get_pipeline_model_parallel_group())
        summed, averaged = entry.reduce_group, entry.avg_group
        if summed is None and averaged is None:  # 0.16's z-loss: each rank has its own tokens'
            averaged = parallel_state.get_tensor_and_context_parallel_group()
        if summed is not None:
            dist.all_reduce(values, group=summed)
        values = _mean_over(values, averaged)
        if entry.needs_dp_avg:
            values = _mean_over(values, parallel_state.get_data_parallel_group())
        losses[_LOGGED_AS.get(name, name)] = values.mean().item() / num_microbatches
    loss_tracker.clear()
    return losses


def _mean_over(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None or group.size() == 1:
        return values
    dist.all_reduce(values, group=group)
    return values / group.size()
