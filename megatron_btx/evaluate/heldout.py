"""Held-out loss per domain and, of an MoE, where each domain's tokens went."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_btx.engine.model import gather_parameters, unwrap
from megatron_btx.engine.moe.noise import set_routing_context
from megatron_btx.engine.moe.router import collect_load, routers
from megatron_btx.errors import UserError

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What a model makes of each domain's held-out text. JSON-ready."""

    loss: dict[str, float]
    """Nats per token by domain, and their ``mean``."""
    load: dict[str, list[list[float]]] | None
    """MoE: by domain, layer and expert, the share of the routed token slots (sums to 1 a layer)."""
    gate: dict[str, list[list[float]]] | None
    """MoE: the same, the mean gate weight over all tokens."""


def evaluate(
    model: torch.nn.Module,
    domains: Mapping[str, Sequence[Batch]],
    *,
    micro_batch_size: int,
    step: int = 0,
) -> HeldOut:
    """Evaluate a model on held-out sequences. Every rank calls it with the same sequences.

    Args:
        model: this rank's part, wrapped or not.
        domains: by name, sequences as ``tokens``, ``labels``, ``loss_mask``, ``position_ids`` [S].
        micro_batch_size: sequences a rank runs at once.
        step: keys the noise of sampled routing.
    """
    gather_parameters(model)
    loss, load, gate = {}, {}, {}
    moe = bool(_has_routers(model))
    for name, sequences in domains.items():
        loss[name], counts = _domain(model, name, sequences, micro_batch_size, step)
        if counts is not None:
            tokens, gates = counts
            load[name] = _rounded(tokens / tokens.sum(1, keepdim=True).clamp_min(1))
            gate[name] = _rounded(gates / gates.sum(1, keepdim=True).clamp_min(1e-12))
    loss["mean"] = sum(loss.values()) / len(loss)
    return HeldOut(loss=loss, load=load if moe else None, gate=gate if moe else None)


def _domain(
    model: torch.nn.Module, name: str, sequences: Sequence[Batch], size: int, step: int
) -> tuple[float, tuple[Tensor, Tensor] | None]:
    """Mean loss of one domain, and its load [layers, experts] as (tokens, gates)."""
    with _load(model) as load:
        outputs = _run(model, name, sequences, size, step, _sums)
    sums = torch.zeros(2, dtype=torch.float64)
    for output in outputs:
        sums += output["sums"].double().cpu()
    sums = sums.to(torch.cuda.current_device())
    dist.all_reduce(sums)  # tensor-parallel ranks add the same terms above and below the line
    total, tokens = sums.tolist()
    if load is None:
        return total / tokens, None
    counted = [load.tokens.to(sums.device), load.gates.to(sums.device)]
    for tensor in counted:
        dist.all_reduce(tensor)
    return total / tokens, (counted[0].cpu(), counted[1].cpu())


def label_log_probs(
    model: torch.nn.Module, name: str, sequences: Sequence[Batch], *, micro_batch_size: int
) -> Tensor:
    """What a model makes of every single token of a domain. Every rank calls it.

    Returns:
        Log-probability (nats) of each label, fp32 [sequences, S] on the CPU of every rank. As in
        :func:`evaluate`, the sequences are those that fill whole batches.
    """
    gather_parameters(model)
    outputs = _run(model, name, sequences, micro_batch_size, 0, _each)
    size, count = _whole_batches(name, sequences, micro_batch_size)
    dp = parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    every = torch.zeros(count, dp, size, sequences[0]["tokens"].shape[-1])
    if parallel_state.get_tensor_model_parallel_rank() == 0 and outputs:
        every[:, rank] = torch.stack([-output["losses"].cpu() for output in outputs])
    every = every.to(torch.cuda.current_device())
    dist.all_reduce(every)  # each place is some one rank's, the others add zero
    return every.flatten(0, 2).cpu()


def _whole_batches(name: str, sequences: Sequence[Batch], size: int) -> tuple[int, int]:
    """Sequences of a rank's micro-batch, and how many micro-batches a rank runs."""
    dp = parallel_state.get_data_parallel_world_size()
    size = min(size, len(sequences) // dp)
    if size == 0:
        raise UserError(
            f"domains.{name}.valid",
            f"holds {len(sequences)} whole sequence(s), fewer than {dp} data-parallel ranks",
            "give it more held-out text",
        )
    return size, len(sequences) // (size * dp)


def _run(
    model: torch.nn.Module,
    name: str,
    sequences: Sequence[Batch],
    size: int,
    step: int,
    keep: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]],
) -> list[dict[str, Tensor]]:
    """Run this data-parallel rank's micro-batches; what ``keep`` makes of the masks and losses
    [B, S] of each. Empty where the last pipeline stage is elsewhere."""
    size, count = _whole_batches(name, sequences, size)
    modules = unwrap(model)
    was_training = modules.training
    model.eval()
    with torch.no_grad():
        outputs: list[dict[str, Tensor]] = get_forward_backward_func()(
            forward_step_func=functools.partial(_forward, step=step, keep=keep),
            data_iterator=_batches(sequences, size, count),
            model=[model],
            num_microbatches=count,
            seq_length=sequences[0]["tokens"].shape[-1],
            micro_batch_size=size,
            forward_only=True,
        )
    model.train(was_training)
    return outputs


def _load(model: torch.nn.Module) -> Any:
    return collect_load(model) if _has_routers(model) else nullcontext()


def _has_routers(model: torch.nn.Module) -> bool:
    return bool(routers(model))


def _batches(sequences: Sequence[Batch], size: int, count: int) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches; a sequence's id is its place in the held-out set."""
    dp = parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    for index in range(count):
        first = (index * dp + rank) * size
        chosen = [sequences[first + row] for row in range(size)]
        batch = {key: torch.stack([one[key] for one in chosen]) for key in chosen[0]}
        batch["samples"] = torch.arange(first, first + size)
        device = torch.cuda.current_device()
        yield {key: value.to(device) for key, value in batch.items()}


def _forward(
    batches: Iterator[Batch], model: torch.nn.Module, *, step: int, keep: Callable[..., Any]
) -> tuple[Tensor, Any]:
    batch = next(batches)
    set_routing_context(step, batch["samples"])
    output = model(
        batch["tokens"], batch["position_ids"], attention_mask=None, labels=batch["labels"]
    )
    return output, functools.partial(keep, batch["loss_mask"])


def _sums(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of losses and number of tokens of a micro-batch."""
    mask = loss_mask.float()
    total = (losses.float() * mask).sum()
    return total, {"sums": torch.stack([total.double(), mask.sum().double()])}


def _each(_loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Every loss by itself."""
    losses = losses.float()
    return losses.sum(), {"losses": losses}


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in values.tolist()]
