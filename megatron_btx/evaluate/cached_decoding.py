"""What follows texts that grow: a token more of each costs one token's work, not the whole text's.

Every rank calls with the same rows and gets the same answers, as of :class:`Predictor`. A row is
some rank's for good: the one that has its keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_btx.engine import platform
from megatron_btx.engine.decoding import KeyValueCache
from megatron_btx.evaluate import btm
from megatron_btx.evaluate.predictor import Predictor, ScoredText


def remembers(predictor: Predictor) -> bool:
    """Whether keys and values can be kept: each rank has whole models, its own attention (not
    Transformer Engine's), and a token's noise does not hang on its place in the batch."""
    layout = predictor.layout
    whole = layout.tensor_model_parallel_size == layout.pipeline_model_parallel_size == 1
    experts = any(one.architecture.experts for one in predictor.members.values())
    apart = layout.expert_model_parallel_size == 1 or not experts
    own = platform.detect().layers != "transformer_engine"
    return whole and apart and own and not _draws(predictor)


def _draws(predictor: Predictor) -> bool:
    routings = [one.architecture.routing for one in predictor.members.values()]
    return any(r is not None and r.type == "sample_top1" and not r.greedy for r in routings)


class Remembered:
    """Takes the place of ``predictor.next`` for rows that are asked for again with a token more.

    Args:
        predictor: of which :func:`remembers` is true.
        room: tokens by which a row grows at most.
    """

    def __init__(self, predictor: Predictor, room: int) -> None:
        self._predictor, self._room = predictor, room
        self._owners: dict[int, int] = {}
        self._rows: list[ScoredText] = []
        self._caches: dict[str, KeyValueCache] = {}
        self._seen = torch.zeros(0)
        """Log-likelihood of each row's tokens under each member, float64 [N, rows]."""
        self._last: dict[str, Tensor] = {}
        """Each member's logits of what follows, [rows, 1, V]."""

    def next(self, rows: Sequence[ScoredText]) -> Tensor:
        """As :meth:`Predictor.next`: log-probabilities fp32 [rows, V] on the CPU."""
        size = parallel_state.get_data_parallel_world_size()
        for place, row in enumerate(rows):
            self._owners.setdefault(row.number, place * size // len(rows))
        rank = parallel_state.get_data_parallel_rank()
        mine = [place for place, row in enumerate(rows) if self._owners[row.number] == rank]
        answers = torch.zeros(len(rows), self._predictor.vocab_size)
        if mine:
            answers[mine] = self._look([rows[place] for place in mine]).cpu()
        if size > 1:
            answers = answers.to(torch.cuda.current_device())
            dist.all_reduce(answers)  # each row is some one rank's, the others add zero
        return self._predictor.numbers(answers.cpu())

    def _look(self, rows: list[ScoredText]) -> Tensor:
        before = {row.number: place for place, row in enumerate(self._rows)}
        kept = [before.get(row.number) for row in rows]
        grown = [
            place is not None and row.ids[:-1] == self._rows[place].ids
            for place, row in zip(kept, rows, strict=True)
        ]
        if all(grown):
            self._go_on(rows, [place for place in kept if place is not None])
        else:
            self._begin(rows)
        self._rows = rows
        weights = self._weights()
        span = slice(0, 1)
        each = [self._predictor.mixed(self._last, weights, at, span) for at in range(len(rows))]
        return torch.cat(each)

    def _begin(self, rows: list[ScoredText]) -> None:
        lengths = torch.tensor([len(row.ids) for row in rows])
        tokens = self._predictor.padded(rows, int(lengths.max()))
        capacity = min(self._predictor.seq_length, int(lengths.max()) + self._room)
        self._caches, logits = {}, {}
        for label, member in self._predictor.members.items():
            shape = member.architecture.model
            cache = self._caches[label] = KeyValueCache(member.module, shape, capacity)
            logits[label] = self._true(cache.read(tokens, lengths))
        places = torch.arange(len(rows)), lengths - 1
        self._last = {label: found[places].unsqueeze(1) for label, found in logits.items()}
        if self._predictor.by_posterior:
            sums = [
                self._predictor.scores(row, at, logits)[:, : len(row.ids) - 1].double().sum(1)
                for at, row in enumerate(rows)
            ]
            self._seen = torch.stack(sums, dim=1)

    def _go_on(self, rows: list[ScoredText], kept: list[int]) -> None:
        tokens = torch.tensor([row.ids[-1] for row in rows]).to(torch.cuda.current_device())
        if kept != list(range(len(self._rows))):
            self._last = {label: found[kept] for label, found in self._last.items()}
            self._seen = self._seen[:, kept] if self._predictor.by_posterior else self._seen
            for cache in self._caches.values():
                cache.keep(kept)
        if self._predictor.by_posterior:
            new = [
                found[:, 0].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
                for found in self._last.values()
            ]
            self._seen = self._seen + torch.stack(new).double()
        self._last = {
            label: self._true(cache.step(tokens)).unsqueeze(1)
            for label, cache in self._caches.items()
        }

    def _true(self, logits: Tensor) -> Tensor:
        """Without the rows that pad the vocabulary."""
        return logits[..., : self._predictor.vocab_size].float()

    def _weights(self) -> list[Tensor] | None:
        """Of each row the members' weights [N, 1] at its last token."""
        method = self._predictor.subject.method
        if method is None:
            return None
        if not self._predictor.by_posterior:
            chosen = (self._predictor.chosen(row, btm.TOP[method]) for row in self._rows)
            device = next(iter(self._last.values())).device
            return [weights[:, -1:].to(device) for weights in chosen]
        known = torch.stack((self._seen, torch.zeros_like(self._seen)), dim=-1)  # [N, rows, 2]
        weights = btm.posterior(known, self._predictor.prior())[..., 1]
        return list(weights.unsqueeze(-1).unbind(1))
