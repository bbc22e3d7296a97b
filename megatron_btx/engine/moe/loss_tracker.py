"""One interface to Megatron's tracker of auxiliary losses (a dictionary up to 0.17, an object
since), and the losses that are logged after a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_btx.engine.megatron_release import MOE_METRICS_TRACKER

if MOE_METRICS_TRACKER:
    from megatron.core.transformer.moe import moe_logging
else:
    from megatron.core.transformer.moe import moe_utils

BALANCE_LOSS = "btx_balance_loss"
"""Name of the paper's loss in the tracker; it is divided by alpha."""

_LOGGED_AS = {BALANCE_LOSS: "balance_loss", "z_loss": "router_z_loss"}


@dataclass(frozen=True)
class Tracked:
    """One loss of the step so far, and how the values of the ranks are reduced.

    ``values`` [layers] are sums over micro-batches; they are summed over ``reduce_group``, averaged
    over ``avg_group``, then over data parallelism unless ``needs_dp_avg`` is false.
    """

    values: Tensor
    reduce_group: dist.ProcessGroup | None
    avg_group: dist.ProcessGroup | None
    needs_dp_avg: bool


def record(
    name: str, loss: Tensor, layer_number: int, num_layers: int, *, avg_group: dist.ProcessGroup
) -> None:
    """Add a layer's loss (a scalar) to the tracker under ``name``; layers count from 1."""
    put: Callable[..., None]
    if MOE_METRICS_TRACKER:
        put = moe_logging.get_moe_metrics_tracker().record
    else:
        put = moe_utils.save_to_aux_losses_tracker
    put(name, loss, layer_number, num_layers, avg_group=avg_group)


def tracked() -> dict[str, Tracked]:
    """Name -> everything recorded since the last :func:`clear`."""
    if MOE_METRICS_TRACKER:
        return {
            name: Tracked(each.values, each.reduce_group, each.avg_group, each.needs_dp_avg)
            for name, each in moe_logging.get_moe_metrics_tracker().metrics.items()
        }
    return {
        name: Tracked(
            each["values"],
            each.get("reduce_group"),
            each.get("avg_group"),
            not each.get("reduce_group_has_dp", False),
        )
        for name, each in moe_utils.get_moe_layer_wise_logging_tracker().items()
    }


def clear() -> None:
    """Set all values to zero."""
    if MOE_METRICS_TRACKER:
        moe_logging.get_moe_metrics_tracker().clear()
    else:
        moe_utils.clear_aux_losses_tracker()


def forget() -> None:
    """Remove all entries: they hold one model's process groups and number of layers."""
    if MOE_METRICS_TRACKER:
        moe_logging.destroy_moe_metrics_tracker()
    else:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()


def pop_balance_loss(num_microbatches: int) -> dict[str, float]:
    """Every auxiliary loss in Megatron's tracker, divided by its coefficient: mean over layers,
    micro-batches and ranks. Empties the tracker. Every rank calls it; empty for a dense model.

    Megatron's own reduction averages by an operation that gloo does not have.
    """
    losses = {}
    for name, entry in tracked().items():
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
    clear()
    return losses


def _mean_over(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None or group.size() == 1:
        return values
    dist.all_reduce(values, group=group)
    return values / group.size()
