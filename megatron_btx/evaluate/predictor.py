"""Next-token predictions of a model or a set of models, on the ranks of a job.

Every rank calls with the same rows and gets the same answers: a harness that decides what to ask
next by what came back (:mod:`megatron_btx.evaluate.lm_eval_adapter`) simply runs on all of them.
Rows are dealt to the data-parallel ranks; under expert parallelism all of those run together, so
each runs the same number of batches, short ones filled up.

Nothing is kept between calls, no keys and values either: texts that grow are cached_decoding.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_btx.data.tokenizer import Tokenizer, given_tokenizer, tokenizer_of
from megatron_btx.engine.moe.noise import set_routing_context
from megatron_btx.engine.moe.router import dropless
from megatron_btx.errors import shown
from megatron_btx.evaluate import btm
from megatron_btx.evaluate.heldout_loss import not_finite
from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.evaluate.models import (
    Live,
    load,
    opened,
    similarity_index,
)
from megatron_btx.evaluate.routing_stats import expert_choices
from megatron_btx.evaluate.tfidf import TfIdf
from megatron_btx.recipe.schema import Layout, Precision

NO_PROGRESS: Callable[[float], None] = lambda share: None  # noqa: E731


@dataclass(frozen=True)
class ScoredText:
    """A text to look at: ``ids`` of which those from ``first`` on are scored, or continued."""

    ids: tuple[int, ...]
    first: int
    """At least 1: the first token is predicted by nothing."""
    number: int = 0
    """Keys the noise of a sampled routing: the same text meets the same noise in any batch."""


@dataclass(frozen=True)
class Score:
    """What a model made of the scored tokens of a row."""

    log_prob: float
    """Their sum, nats."""
    is_greedy: bool
    """Whether each was the likeliest."""


class Predictor:
    """A subject, loaded.

    Args:
        subject: what.
        layout: of this job, whose process groups exist.
        precision: ``None``: as stored.
        micro_batch_size: rows that a rank runs at once.
        tokenizer: ``None``: the checkpoint's own.
        random_seed: of a sampled routing.

    Raises:
        UserError: a checkpoint or its tokenizer is missing or damaged.
    """

    def __init__(
        self,
        subject: Subject,
        layout: Layout,
        *,
        precision: Precision | None = None,
        micro_batch_size: int = 8,
        tokenizer: str | None = None,
        random_seed: int = 0,
    ) -> None:
        self.subject, self.layout = subject, layout
        self.tokenizer: Tokenizer = (
            tokenizer_of(subject.first) if tokenizer is None else given_tokenizer(Path(tokenizer))
        )
        self.start_id = self.tokenizer.start_id
        self.members: dict[str, Live] = {
            label: load(checkpoint, layout, precision, random_seed)
            for label, checkpoint in opened(subject, tokenizer).items()
        }
        architectures = [member.architecture for member in self.members.values()]
        self.expert_choice = expert_choices(one.routing for one in architectures)
        """Of Sample Top-1 (routing_stats.py)."""
        self.vocab_size = architectures[0].vocab_size
        """Of the models; the tokenizer may have fewer tokens, or more that no text makes."""
        ends = np.array([self.start_id, self.tokenizer.eos_id])
        self.tokenizer.check_ids(ends, self.vocab_size, where=f"the tokenizer of {subject.name}")
        self.seq_length = min(one.model.seq_length for one in architectures)
        self._index: TfIdf | None = similarity_index(subject, random_seed)
        self.by_posterior = subject.method is not None and self._index is None
        self._size = micro_batch_size
        self.rows_at_once = micro_batch_size * layout.data_parallel_size
        self._multiple = layout.tensor_model_parallel_size  # sequence parallelism cuts rows evenly

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without a begin token.

        Raises:
            UserError: an id lies outside the models' vocabulary.
        """
        ids = self.tokenizer.encode([text])[0]
        self.tokenizer.check_ids(ids, self.vocab_size, where=shown(repr(text), 60))
        return ids.tolist()

    def score(
        self, rows: Sequence[ScoredText], progress: Callable[[float], None] = NO_PROGRESS
    ) -> list[Score]:
        """How likely the scored tokens of each row are. No row is longer than ``seq_length + 1``:
        its last token is predicted, not read.

        Raises:
            UserError: the model computes NaN or infinity; every rank raises it.
        """
        answers = self._each(rows, 2, self._scored, progress, drop_last=True)
        return [Score(total, greedy > 0.5) for total, greedy in answers.tolist()]

    def next(self, rows: Sequence[ScoredText]) -> Tensor:
        """Log-probabilities of what follows each row, fp32 [rows, V] on the CPU.

        No row is longer than ``seq_length``.

        Raises:
            UserError: the model computes NaN or infinity; every rank raises it.
        """
        width = self.vocab_size
        return self._each(rows, width, self._following, NO_PROGRESS, drop_last=False).float()

    def _each(
        self,
        rows: Sequence[ScoredText],
        width: int,
        look: Callable[[Sequence[ScoredText], dict[str, Tensor]], Tensor],
        progress: Callable[[float], None],
        *,
        drop_last: bool,
    ) -> Tensor:
        """``look``'s answers to every row, float64 [rows, width]. Rows of like length run
        together."""
        dp = parallel_state.get_data_parallel_world_size()
        rank = parallel_state.get_data_parallel_rank()
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place].ids))
        answers = torch.zeros(len(rows), width, dtype=torch.float64)
        step = self._size * dp
        for start in range(0, len(order), step):
            chunk = order[start : start + step]
            size = -(-len(chunk) // dp)
            mine = chunk[rank * size : (rank + 1) * size]
            filled = [rows[place] for place in (*mine, *[chunk[0]] * (size - len(mine)))]
            longest = max(1, max(len(rows[place].ids) for place in chunk) - drop_last)
            logits = self._run(filled, longest)
            if logits and mine and parallel_state.get_tensor_model_parallel_rank() == 0:
                answers[mine] = look(filled[: len(mine)], logits).double().cpu()
            progress(min(1.0, (start + step) / len(order)))
        answers = answers.to(torch.cuda.current_device())
        dist.all_reduce(answers)  # each row is some one rank's, the others add zero
        return self.numbers(answers.cpu())

    def numbers(self, answers: Tensor) -> Tensor:
        """Answers, the same on every rank, of which each is a finite number.

        Raises:
            UserError: one is not: no score and no token could be made of it.
        """
        if answers.isfinite().all():
            return answers
        raise not_finite(self.subject.name)

    @torch.no_grad()
    def _run(self, rows: Sequence[ScoredText], longest: int) -> dict[str, Tensor]:
        """Each member's logits [B, S, V] of this rank's rows; none where the last pipeline stage
        is elsewhere."""
        length = -(-longest // self._multiple) * self._multiple
        tokens = self.padded([replace(row, ids=row.ids[:longest]) for row in rows], length)
        batch = {
            "tokens": tokens,
            "positions": torch.arange(length).expand(tokens.shape).contiguous(),
            "samples": torch.tensor([row.number for row in rows]),
        }
        batch = {key: value.to(torch.cuda.current_device()) for key, value in batch.items()}
        return {
            label: found
            for label, member in self.members.items()
            if (found := self._logits(member, batch)) is not None
        }

    def padded(self, rows: Sequence[ScoredText], length: int) -> Tensor:
        """The rows' ids side by side, filled up at the end, int64 [rows, length]."""
        tokens = torch.full((len(rows), length), self.start_id)
        for place, row in enumerate(rows):
            tokens[place, : len(row.ids)] = torch.tensor(row.ids)
        return tokens.to(torch.cuda.current_device())

    def _logits(self, member: Live, batch: dict[str, Tensor]) -> Tensor | None:
        size, length = batch["tokens"].shape
        with dropless(member.module):
            outputs = get_forward_backward_func()(
                forward_step_func=_forward,
                data_iterator=iter([batch]),
                model=[member.module],
                num_microbatches=1,
                seq_length=length,
                micro_batch_size=size,
                forward_only=True,
            )
        return outputs[0]["logits"][..., : self.vocab_size].float() if outputs else None

    def _scored(self, rows: Sequence[ScoredText], logits: dict[str, Tensor]) -> Tensor:
        """Sum of log-probabilities, and 1 where all are greedy: [rows, 2]."""
        weights = self._weights(rows, logits)
        answers = torch.zeros(len(rows), 2, dtype=torch.float64)
        for place, row in enumerate(rows):
            span = slice(row.first - 1, len(row.ids) - 1)
            labels = torch.tensor(row.ids[row.first :], device=_device(logits))
            if not len(labels):
                answers[place, 1] = 1
                continue
            mixed = self.mixed(logits, weights, place, span)
            answers[place, 0] = mixed.gather(1, labels[:, None]).double().sum()
            answers[place, 1] = (mixed.argmax(1) == labels).all()
        return answers

    def _following(self, rows: Sequence[ScoredText], logits: dict[str, Tensor]) -> Tensor:
        """Log-probabilities [rows, V] at the last token of each."""
        weights = self._weights(rows, logits)
        spans = [slice(len(row.ids) - 1, len(row.ids)) for row in rows]
        return torch.cat(
            [self.mixed(logits, weights, place, span) for place, span in enumerate(spans)]
        )

    def mixed(
        self, logits: dict[str, Tensor], weights: Sequence[Tensor] | None, row: int, span: slice
    ) -> Tensor:
        """The average's log-probabilities [positions, V] within one row."""
        each = [found[row, span].log_softmax(-1) for found in logits.values()]
        if weights is None:
            return each[0]
        return btm.mixed(torch.stack(each), weights[row][:, span, None])

    def _weights(
        self, rows: Sequence[ScoredText], logits: dict[str, Tensor]
    ) -> Sequence[Tensor] | None:
        """Of each row the members' weights [N, S]."""
        method = self.subject.method
        if method is None:
            return None
        if self.by_posterior:
            return [
                btm.posterior(self.scores(row, place, logits), self.prior())
                for place, row in enumerate(rows)
            ]
        return [self.chosen(row, btm.TOP[method]).to(_device(logits)) for row in rows]

    def scores(self, row: ScoredText, place: int, logits: dict[str, Tensor]) -> Tensor:
        """Log-probability of each token's successor under each member, [N, tokens read]; that of
        the last is not known, and stands for nothing."""
        labels = torch.tensor((*row.ids[1:], 0), device=_device(logits))
        read = next(iter(logits.values())).shape[1]
        labels = labels[:read]
        return torch.stack(
            [
                found[place, : len(labels)].gather(1, labels[:, None])[:, 0]
                - found[place, : len(labels)].logsumexp(-1)
                for found in logits.values()
            ]
        )

    def prior(self) -> Tensor | None:
        """Of the members, summing to 1, [N]."""
        prior = self.subject.prior
        if prior is None:
            return None
        known = torch.tensor([prior[name] for name in self.members])
        return (known / known.sum()).to(torch.cuda.current_device())

    def chosen(self, row: ScoredText, k: int) -> Tensor:
        """Weights [N, tokens] of the k members whose text is most like a row's."""
        assert self._index is not None
        ids = torch.tensor(row.ids)
        if self.subject.context == "document":
            known = btm.chosen_weights(
                self._index, ids[: row.first], self.tokenizer.decode, k=k, context="document"
            )
            return known[:, :1].expand(-1, len(ids))
        return btm.chosen_weights(self._index, ids, self.tokenizer.decode, k=k, context="prefix")


def _forward(
    batches: Iterator[dict[str, Tensor]], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    batch = next(batches)
    set_routing_context(0, batch["samples"])
    output = model(batch["tokens"], batch["positions"], attention_mask=None)
    return output, _whole


def _whole(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of the whole vocabulary; Megatron wants a loss beside them."""
    return output.new_zeros(()), {"logits": gather_from_tensor_model_parallel_region(output)}


def _device(logits: dict[str, Tensor]) -> torch.device:
    return next(iter(logits.values())).device
