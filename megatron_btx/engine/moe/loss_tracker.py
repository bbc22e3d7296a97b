"""Megatron's tracker of auxiliary losses: a dictionary up to 0.17, an object since, here one
interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_btx.engine.megatron_release import MOE_METRICS_TRACKER

if MOE_METRICS_TRACKER:
    from megatron.core.transformer.moe import moe_logging
else:
    from megatron.core.transformer.moe import moe_utils


@dataclass(frozen=True)
class Tracked:
    """One loss of the step so far, and how the ranks' values become one.

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
    """Add a layer's loss (a scalar) to what is tracked as ``name``; layers count from 1."""
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
    """Drop the entries too: they hold process groups and the number of layers of one model."""
    if MOE_METRICS_TRACKER:
        moe_logging.destroy_moe_metrics_tracker()
    else:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
