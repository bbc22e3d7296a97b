"""Any JSONL as the sequences that a model is evaluated on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_btx.data.heldout import Sample
from megatron_btx.data.tokenizer import Tokenizer
from megatron_btx.errors import UserError

_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Size:
    """What there is of a text."""

    documents: int
    tokens: int
    """Those that end documents are among them: they are predicted too."""
    bytes: int
    """Of the documents, UTF-8."""


class PackedText(Sequence[Sample]):
    """Documents one behind the other, each with its end token, in sequences of ``seq_length``.

    As in training, but that every token is predicted once: ``start_id`` stands before the first,
    and the last sequence is filled up with what does not count (``loss_mask`` 0).

    Args:
        documents: the text.
        tokenizer: the model's.
        seq_length: S.
        start_id: what stands before a text.
        most: so many tokens at most, whole documents; ``None``: all.
        where: the text's name, for messages.

    Raises:
        UserError: there is no text.
    """

    def __init__(
        self,
        documents: Iterable[str],
        tokenizer: Tokenizer,
        seq_length: int,
        *,
        start_id: int,
        most: int | None = None,
        where: str = "text",
    ) -> None:
        self.seq_length, self.tokenizer = seq_length, tokenizer
        pieces: list[np.ndarray] = [np.array([start_id], np.int32)]
        size = {"documents": 0, "tokens": 0, "bytes": 0}
        for texts in _batches(documents):
            if most is not None and size["tokens"] >= most:
                break
            for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
                if most is not None and size["tokens"] >= most:
                    break
                pieces.append(np.append(ids, np.int32(tokenizer.eos_id)))
                size["documents"] += 1
                size["tokens"] += len(ids) + 1
                size["bytes"] += len(text.encode())
        if not size["documents"]:
            raise UserError(where, "holds no document", "give JSONL with some text")
        self.size = Size(**size)
        stream = np.concatenate(pieces)
        count = -(-self.size.tokens // seq_length)
        self._ids = np.full(count * seq_length + 1, start_id, np.int32)
        self._ids[: len(stream)] = stream

    def __len__(self) -> int:
        return (len(self._ids) - 1) // self.seq_length

    def __getitem__(self, index: Any) -> Any:
        """Sequence ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.seq_length
        text = torch.from_numpy(self._ids[first : first + self.seq_length + 1].astype(np.int64))
        positions = torch.arange(self.seq_length)
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": (first + positions < self.size.tokens).float(),
            "position_ids": positions,
        }


def _batches(documents: Iterable[str]) -> Iterable[list[str]]:
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
