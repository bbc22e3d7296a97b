"""Held-out loss per domain and, of an MoE, where each domain's tokens went.

Every sequence counts, whatever the micro-batch size and the layout: where a batch is not full, it
is filled up with a sequence whose tokens are masked.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_btx.engine.heartbeat import HEART
from megatron_btx.engine.model import for_chunks, gather_parameters, model_chunks
from megatron_btx.engine.moe.noise import set_routing_context
from megatron_btx.engine.moe.router import Load, collect_load, dropless, routers
from megatron_btx.errors import UserError

Batch = dict[str, Tensor]

Listener = Callable[[Batch], None]
"""Called with each micro-batch before its forward pass, on every rank that runs a part of it."""

Keep = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(loss mask, losses), both [B, S] -> (a loss for Megatron, what is kept)."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Losses and routing of a model on each domain's held-out text. JSON-ready."""

    loss: dict[str, float]
    """Nats per token by domain, and their ``mean``."""
    load: dict[str, list[list[float]]] | None
    """MoE: by domain, layer and expert, the share of the routed token slots (sums to 1 a layer)."""
    gate: dict[str, list[list[float]]] | None
    """MoE: the same, the mean gate weight over all tokens."""


def check_finite(model: str, found: HeldOut) -> None:
    """That what was measured are numbers. Every rank has the same, so all of them raise.

    Raises:
        UserError: ``model`` computes NaN or infinity; it names the domains.
    """
    wrong = {
        domain: None
        for measured in (found.loss, found.load or {}, found.gate or {})
        for domain, values in measured.items()
        if domain in list(found.loss)[:-1] and not torch.tensor(values).isfinite().all()
    }
    if wrong:
        raise not_finite(model, f" on the text of {', '.join(wrong)}")


def not_finite(model: str, where: str = "") -> UserError:
    """For a model whose predictions are no numbers, ``where``: on which text."""
    why = "its weights hold NaN or infinity, or its activations overflow"
    fix = "compare it with what it was made of (btx verify), or compute in fp32"
    return UserError(model, f"computes NaN or infinity{where}: {why}", fix)


def evaluate(
    model: torch.nn.Module,
    domains: Mapping[str, Sequence[Batch]],
    *,
    micro_batch_size: int,
    step: int = 0,
    listener: Listener | None = None,
) -> HeldOut:
    """Evaluate a model on held-out sequences. Every rank calls it with the same sequences.

    Args:
        model: this rank's part, wrapped or not.
        domains: by name, sequences as ``tokens``, ``labels``, ``loss_mask``, ``position_ids`` [S],
            and ``document_begins`` [S] where attention is reset at the ends of documents. Tokens
            whose ``loss_mask`` is 0 count neither in the loss nor in the load.
        micro_batch_size: sequences a rank runs at once, at most.
        step: keys the noise of sampled routing.
        listener: told of every micro-batch.

    Raises:
        UserError: a domain has no sequence.
    """
    gather_parameters(model)
    loss, load, gate = {}, {}, {}
    for name, sequences in domains.items():
        run = _Pass(model, name, sequences, micro_batch_size, step)
        loss[name], counts = _domain(run, listener)
        if counts is not None:
            tokens, gates = counts
            load[name] = _rounded(tokens / tokens.sum(1, keepdim=True).clamp_min(1))
            gate[name] = _rounded(gates / gates.sum(1, keepdim=True).clamp_min(1e-12))
    loss["mean"] = sum(loss.values()) / len(loss)
    moe = _has_routers(model)
    return HeldOut(loss=loss, load=load if moe else None, gate=gate if moe else None)


def label_log_probs(
    model: torch.nn.Module, name: str, sequences: Sequence[Batch], *, micro_batch_size: int
) -> Tensor:
    """The log-probability of every single token of a domain. Every rank calls it.

    Returns:
        Log-probability (nats) of each label, fp32 [sequences, S] on the CPU of every rank; also of
        labels whose ``loss_mask`` is 0.

    Raises:
        UserError: there is no sequence.
    """
    gather_parameters(model)
    run = _Pass(model, name, sequences, micro_batch_size, 0)
    outputs = run.outputs(_each)
    dp = parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    every = torch.zeros(run.count, dp, run.size, sequences[0]["tokens"].shape[-1])
    if parallel_state.get_tensor_model_parallel_rank() == 0 and outputs:
        every[:, rank] = torch.stack([-output["losses"].cpu() for output in outputs])
    every = every.to(torch.cuda.current_device())
    dist.all_reduce(every)  # each place is some one rank's, the others add zero
    return every.flatten(0, 2)[: len(sequences)].cpu()


def text_of(domains: Mapping[str, Sequence[Batch]]) -> dict[str, dict[str, Any]]:
    """What must be equal for losses to be compared: by domain the number of ``tokens`` predicted,
    and the ``sha256`` of all ids and masks, sequence by sequence."""
    return {name: _identity(sequences) for name, sequences in domains.items()}


def _identity(sequences: Sequence[Batch]) -> dict[str, Any]:
    content, tokens = hashlib.sha256(), 0
    for place in range(len(sequences)):
        one = sequences[place]
        for key in ("tokens", "labels", "loss_mask", *({"document_begins"} & one.keys())):
            content.update(one[key].to(torch.int32).numpy().astype("<i4").tobytes())
        tokens += int(one["loss_mask"].sum())
    return {"tokens": tokens, "sha256": content.hexdigest()}


def _domain(run: _Pass, listener: Listener | None) -> tuple[float, tuple[Tensor, Tensor] | None]:
    """Mean loss of one domain, and its load [layers, experts] as (tokens, gates)."""
    listeners = [] if listener is None else [listener]
    with _load(run.model) as load:
        if load is not None:
            listeners.append(_expected(load))
        outputs = run.outputs(_sums, listeners)
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


def _expected(load: Load) -> Listener:
    """Tells the load which of the next micro-batch's tokens count."""

    def listener(batch: Batch) -> None:
        load.mask = batch["loss_mask"]

    return listener


class _Pass:
    """A domain's sequences through a model, dealt to the data-parallel ranks.

    Every rank runs the same ``count`` micro-batches of the same ``size``, as expert parallelism and
    pipelines ask for; the sizes are as even as they can be, so that few places are left to fill.
    """

    def __init__(
        self, model: torch.nn.Module, name: str, sequences: Sequence[Batch], most: int, step: int
    ) -> None:
        if not len(sequences):
            what, fix = "holds no whole sequence", "give it more held-out text"
            raise UserError(f"domains.{name}.valid", what, fix)
        self.model, self.name, self.sequences, self.step = model, name, sequences, step
        dp = parallel_state.get_data_parallel_world_size()
        self.count = -(-len(sequences) // (most * dp))
        if len(model_chunks(model)) > 1:  # the interleaved schedule takes them in groups of PP
            pp = parallel_state.get_pipeline_model_parallel_world_size()
            self.count = -(-self.count // pp) * pp
        self.size = -(-len(sequences) // (self.count * dp))

    def outputs(self, keep: Keep, listeners: Sequence[Listener] = ()) -> list[dict[str, Tensor]]:
        """What ``keep`` makes of the masks and losses [B, S] of each of this rank's micro-batches.
        Empty where the last pipeline stage is elsewhere."""
        was_training = self.model.training
        self.model.eval()
        forward = functools.partial(_forward, step=self.step, keep=keep, listeners=listeners)
        with torch.no_grad(), dropless(self.model):
            outputs: list[dict[str, Tensor]] = get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=for_chunks(self.model, self._batches()),
                model=model_chunks(self.model),
                num_microbatches=self.count,
                seq_length=self.sequences[0]["tokens"].shape[-1],
                micro_batch_size=self.size,
                forward_only=True,
            )
        self.model.train(was_training)
        return outputs

    def _batches(self) -> Iterator[Batch]:
        """This data-parallel rank's micro-batches; a sequence's id is its place in the text."""
        dp = parallel_state.get_data_parallel_world_size()
        rank = parallel_state.get_data_parallel_rank()
        device = torch.cuda.current_device()
        for index in range(self.count):
            first = (index * dp + rank) * self.size
            chosen = [self._sequence(first + row) for row in range(self.size)]
            batch = {key: torch.stack([one[key] for one in chosen]) for key in chosen[0]}
            batch["samples"] = torch.arange(first, first + self.size)
            HEART.beat(f"micro-batch {index} of {self.name}")
            yield {key: value.to(device) for key, value in batch.items()}

    def _sequence(self, place: int) -> Batch:
        """A sequence; behind the last one, that one again, masked."""
        if place < len(self.sequences):
            return self.sequences[place]
        last = self.sequences[len(self.sequences) - 1]
        return {**last, "loss_mask": torch.zeros_like(last["loss_mask"])}


def _load(model: torch.nn.Module) -> AbstractContextManager[Load | None]:
    return collect_load(model) if _has_routers(model) else nullcontext()


def _has_routers(model: torch.nn.Module) -> bool:
    return bool(routers(model))


def _forward(
    batches: Iterator[Batch],
    model: torch.nn.Module,
    *,
    step: int,
    keep: Keep,
    listeners: Sequence[Listener],
) -> tuple[Tensor, Any]:
    batch = next(batches)
    set_routing_context(step, batch["samples"])
    for listener in listeners:
        listener(batch)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        attention_mask=batch.get("document_begins"),
        labels=batch["labels"],
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
