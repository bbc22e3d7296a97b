"""One optimizer step, through Megatron's own schedules."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_btx.engine.model import for_chunks, model_chunks
from megatron_btx.engine.moe.noise import set_routing_context
from megatron_btx.train.throughput import Stopwatch

Batch = dict[str, Tensor]
"""``tokens``, ``labels``, ``loss_mask``, ``position_ids`` [B, S], where attention is reset at the
ends of documents ``document_begins`` [B, S]; ``samples`` [B], their ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step did; the same on every rank."""

    loss: float
    """Mean over the global batch, nats per token."""
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""
    seconds: dict[str, float] = field(default_factory=dict)
    """This rank's, by part: ``data_loading``, ``forward_backward``, ``optimizer``."""


def forward_step(
    batches: Iterator[Batch], model: torch.nn.Module, *, step: int, weight: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Megatron's ``forward_step_func``: one micro-batch through this rank's part of the model.
    ``weight``: of a token in the loss; ``None``: all micro-batches count alike."""
    batch = next(batches)
    set_routing_context(step, batch["samples"])
    output = model(
        batch["tokens"],
        batch["position_ids"],
        attention_mask=batch.get("document_begins"),
        labels=batch["labels"],
    )
    return output, functools.partial(mean_loss, batch["loss_mask"], weight=weight)


def mean_loss(
    loss_mask: Tensor, losses: Tensor, *, weight: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over a micro-batch's unmasked tokens, or their sum times ``weight``; nats per token.

    What is logged is a copy: Megatron divides the loss in place by the number of micro-batches.
    """
    mask = loss_mask.view(-1).float()
    total = (losses.float().view(-1) * mask).sum()
    loss = total / mask.sum() if weight is None else total * weight
    return loss, {"loss": loss.clone().detach()}


def train_step(
    model: torch.nn.Module,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler | None,
    batches: Iterator[Batch],
    *,
    step: int,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    masked: bool = False,
) -> StepResult:
    """Forward and backward of every micro-batch, then the update.

    Args:
        model: in Megatron's wrappers (``engine.model.wrap_ddp``).
        batches: at least ``num_microbatches`` micro-batches for this data-parallel rank, the same
            on every tensor- and pipeline-parallel rank.
        step: counts from 0; keys the routing's noise and temperature.
        masked: some tokens are not predicted. The loss is then the mean over those of the global
            batch that are, as with Megatron's ``calculate_per_token_loss``: micro-batches that have
            more of them count more, whatever the layout.
    """
    watch = Stopwatch()
    batches, weight = watch.waiting(batches), None
    if masked:
        held = list(itertools.islice(batches, num_microbatches))
        batches, weight = iter(held), token_weight([batch["loss_mask"] for batch in held])
    chunks: list[Any] = model_chunks(model)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    forwards = get_forward_backward_func()(
        forward_step_func=functools.partial(forward_step, step=step, weight=weight),
        data_iterator=for_chunks(model, batches),
        model=chunks,
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=False,
    )
    loss = global_mean([forward["loss"] for forward in forwards])
    watch.lap("forward_backward")
    _, grad_norm, _ = optimizer.step()
    if schedule is not None:
        schedule.step(increment=1)
    norm = float(grad_norm or 0.0)
    watch.lap("optimizer")
    return StepResult(loss=loss, grad_norm=norm, seconds=watch.seconds)


def token_weight(masks: list[Tensor]) -> Tensor:
    """What a token counts for in the loss of its micro-batch, so that the mean of all micro-batches
    of all data-parallel ranks is that of the global batch's unmasked tokens.

    Args:
        masks: of this rank's micro-batches, [B, S] each.
    """
    total = torch.stack([mask.float().sum() for mask in masks]).sum()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(total, group=group)
    return len(masks) * group.size() / total.clamp_min(1.0)


def global_mean(micro_losses: list[Tensor]) -> float:
    """Mean over micro-batches and data-parallel ranks, known to every rank afterwards.

    Only the last pipeline stage has losses; the others pass an empty list.
    """
    total = torch.zeros(1, device=torch.cuda.current_device())
    if micro_losses:
        total += torch.stack([loss.float() for loss in micro_losses]).mean()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(total, group=group)
    total /= group.size()
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return total.item()
