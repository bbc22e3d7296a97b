"""Any text, or token ids, as the sequences that a model is evaluated on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_btx.data.documents import read_documents
from megatron_btx.data.formats import format_of, token_pair
from megatron_btx.data.formats.part import TEXT_KEY
from megatron_btx.data.heldout_sequences import Sample
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
        documents: the text, or ids without an end token.
        tokenizer: the model's.
        seq_length: S.
        start_id: what stands before a text.
        vocab_size: of the model; ``None``: the tokenizer's.
        most: so many tokens at most, whole documents; ``None``: all.
        where: the text's name, for messages.

    Raises:
        UserError: there is no text, or the model has no row for a token of it.
    """

    def __init__(
        self,
        documents: Iterable[str | np.ndarray],
        tokenizer: Tokenizer,
        seq_length: int,
        *,
        start_id: int,
        vocab_size: int | None = None,
        most: int | None = None,
        where: str = "text",
    ) -> None:
        self.seq_length, self.tokenizer = seq_length, tokenizer
        pieces: list[np.ndarray] = [np.array([start_id], np.int32)]
        size = {"documents": 0, "tokens": 0, "bytes": 0}
        for ids, length in _encoded(documents, tokenizer):
            if most is not None and size["tokens"] >= most:
                break
            pieces.append(np.append(ids, np.int32(tokenizer.eos_id)))
            tokenizer.check_ids(pieces[-1], vocab_size or tokenizer.vocab_size, where=where)
            size["documents"] += 1
            size["tokens"] += len(ids) + 1
            size["bytes"] += length
        if not size["documents"]:
            raise UserError(where, "holds no document", "give JSONL with some text")
        self.size = Size(**size)
        stream = np.concatenate(pieces)
        count = -(-self.size.tokens // seq_length)
        self._ids = np.full(count * seq_length + 1, start_id, np.int32)
        self._ids[: len(stream)] = stream

    def __len__(self) -> int:
        return (len(self._ids) - 1) // self.seq_length

    def fitted(self, multiple: int) -> PackedText:
        """The same in a sequence no longer than it must be, where there is less text than one
        holds; its length is a multiple of ``multiple``."""
        length = -(-self.size.tokens // multiple) * multiple
        if length < self.seq_length:
            self._ids, self.seq_length = self._ids[: length + 1], length
        return self

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


def read(files: Sequence[Path], text_key: str, tokenizer: Tokenizer) -> Iterator[str | np.ndarray]:
    """The documents of ``files``; of Megatron pairs their ids, int32 [n], without the end token.

    Raises:
        UserError: a file cannot be read, or a pair is of another tokenizer.
    """
    for file in files:
        if format_of(file) is token_pair:
            pair = token_pair.TokenPair(file)
            pair.check_ids(tokenizer.eos_id, tokenizer.vocab_size)
            yield from (ids[:-1].astype(np.int32) for ids in pair.documents())
        else:
            try:
                yield from read_documents([file], text_key)
            except UserError as error:  # there is no recipe here
                fix = error.fix.replace(TEXT_KEY, "--text-key")
                raise UserError(error.where, error.what, fix) from error


def _encoded(
    documents: Iterable[str | np.ndarray], tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, int]]:
    """Ids of every document and its bytes of UTF-8; of ids, those that they are decoded to."""
    for batch in _batched(documents):
        if isinstance(batch[0], str):
            sizes = [len(text.encode()) for text in batch]
            yield from zip(tokenizer.encode(batch), sizes, strict=True)
        else:
            yield from ((ids, len(tokenizer.decode(ids).encode())) for ids in batch)


def _batched(documents: Iterable[str | np.ndarray]) -> Iterator[list[Any]]:
    """Some at a time, all of a kind."""
    for _, same in groupby(documents, type):
        while batch := list(islice(same, _AT_ONCE)):
            yield batch
