"""Text from a model: greedy, or drawn with a temperature from the likeliest tokens (top-p)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_btx.evaluate.cached_decoding import Remembered, remembers
from megatron_btx.evaluate.predictor import NO_PROGRESS, Predictor, ScoredText


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the next token is chosen, and when to end."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0: the likeliest token."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities reach this."""
    random_seed: int = 0
    until: tuple[str, ...] = ()
    """Text that ends a continuation and is no part of it."""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What followed a prompt."""

    text: str
    tokens: int
    """That were generated; more than are in ``text`` where it was cut."""
    ended: bool
    """By the end token or by ``until``, not by the number of tokens."""
    cut: int = 0
    """Tokens at the prompt's beginning for which there was no room."""


def generate(
    predictor: Predictor,
    prompts: Sequence[str],
    decoding: Decoding | Sequence[Decoding],
    progress: Callable[[float], None] = NO_PROGRESS,
) -> list[Continuation]:
    """Continue prompts; every rank calls it and gets the same.

    What a prompt is continued with depends on no other prompt: each draws from a generator of its
    own, keyed by the seed and its place. A prompt that leaves no room in the model's context is cut
    at its beginning. Keys and values are kept where :func:`remembers` says so; elsewhere a token
    costs a pass over all that stands before it.
    """
    settings = [decoding] * len(prompts) if isinstance(decoding, Decoding) else list(decoding)
    texts = [_Text(predictor, prompt, at, one) for at, (prompt, one) in
             enumerate(zip(prompts, settings, strict=True))]  # fmt: skip
    total = sum(one.max_new_tokens for one in settings)
    order = sorted(texts, key=lambda text: -len(text.prompt))  # of like length together
    for first in range(0, len(order), predictor.rows_at_once):
        together = order[first : first + predictor.rows_at_once]
        room = max(text.decoding.max_new_tokens for text in together)
        following = Remembered(predictor, room) if remembers(predictor) else predictor
        while going := [text for text in together if not text.done]:
            found = following.next([text.row() for text in going])
            for text, log_probs in zip(going, found, strict=True):
                text.add(pick(log_probs, text.decoding, text.draw))
            left = sum(t.decoding.max_new_tokens - len(t.new) for t in texts if not t.done)
            progress(1 - left / max(total, 1))
    return [text.continuation() for text in texts]


def pick(log_probs: Tensor, decoding: Decoding, draw: torch.Generator) -> int:
    """The next token, of log-probabilities [V]; the first of several likeliest."""
    if decoding.temperature == 0:
        return int(log_probs.argmax())
    probabilities = torch.softmax(log_probs.double() / decoding.temperature, dim=0)
    values, order = probabilities.sort(descending=True, stable=True)
    before = values.cumsum(0) - values
    kept = torch.where(before < decoding.top_p, values, 0.0)
    point = torch.rand((), generator=draw, dtype=torch.float64) * kept.sum()
    place = int(torch.searchsorted(kept.cumsum(0), point, right=True))
    return int(order[min(place, int((kept > 0).sum()) - 1)])


class _Text:
    """A prompt that is being continued."""

    def __init__(self, predictor: Predictor, prompt: str, number: int, decoding: Decoding) -> None:
        self._predictor, self.number, self.decoding = predictor, number, decoding
        self.draw = torch.Generator().manual_seed(decoding.random_seed * 1_000_003 + number)
        room = max(1, predictor.seq_length - decoding.max_new_tokens)
        whole = [predictor.start_id, *predictor.encode(prompt)]
        self.prompt = whole[-room:]
        self._left_out = len(whole) - len(self.prompt)
        self.new: list[int] = []
        self._cut: int | None = None
        self.done = decoding.max_new_tokens == 0

    def row(self) -> ScoredText:
        """All that is known; of a text longer than the context, its end."""
        ids = [*self.prompt, *self.new][-self._predictor.seq_length :]
        return ScoredText(tuple(ids), first=min(len(self.prompt), len(ids)), number=self.number)

    def add(self, token: int) -> None:
        """Take a token, and see whether it is the last."""
        self.new.append(token)
        if token == self._predictor.tokenizer.eos_id:
            self._cut = len(self.text([*self.new[:-1]]))
        elif self.decoding.until:
            text = self.text(self.new)
            places = [text.find(stop) for stop in self.decoding.until if stop in text]
            self._cut = min(places) if places else None
        self.done = self._cut is not None or len(self.new) >= self.decoding.max_new_tokens

    def text(self, new: list[int]) -> str:
        """Decoded together with the end of the prompt: alone, some tokenizers drop a space."""
        before = self.prompt[-8:]
        decode = self._predictor.tokenizer.decode
        return decode([*before, *new])[len(decode(before)) :]

    def continuation(self) -> Continuation:
        """Of one prompt."""
        text = self.text([t for t in self.new if t != self._predictor.tokenizer.eos_id])
        return Continuation(
            text=text[: self._cut],
            tokens=len(self.new),
            ended=self._cut is not None,
            cut=self._left_out,
        )
