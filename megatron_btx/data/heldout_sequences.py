"""A domain's held-out text as whole sequences, the same in every evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megatron_btx.data.boundaries import Boundaries, boundaries_of
from megatron_btx.data.prepare import prefix, tokenized_split
from megatron_btx.data.tokenized import pairs
from megatron_btx.data.tokenizer import load_tokenizer
from megatron_btx.errors import UserError
from megatron_btx.recipe.schema import Recipe

Sample = dict[str, Tensor]
"""``tokens``, ``labels``, ``position_ids`` int64 [S] and ``loss_mask`` float32 [S]; where attention
is reset at the ends of documents, ``document_begins`` int64 [S]."""


class HeldOutText(Sequence[Sample]):
    """Complete sequences of the concatenated documents, read on access.

    If there are more than ``tokens`` allows, evenly spaced ones are used: the first documents of a
    file may all be of one kind.

    Args:
        prefixes: of its .bin/.idx pairs, which are concatenated.
        seq_length: S.
        tokens: the most tokens to use.
        sha256: hash of the files' content, to recognise results on the same text.
        boundaries: how the ends of documents are treated; ``None``: not at all.
    """

    def __init__(
        self,
        prefixes: Sequence[Path],
        seq_length: int,
        tokens: int,
        sha256: str = "",
        boundaries: Boundaries | None = None,
    ) -> None:
        self._pairs = [IndexedDataset(str(prefix)) for prefix in prefixes]
        lengths = [int(pair.sequence_lengths.sum(dtype=np.int64)) for pair in self._pairs]
        self._begins = np.cumsum([0, *lengths])
        length = int(self._begins[-1])
        self._whole = max(0, (length - 1) // seq_length)  # a last token is only a label
        self._length = min(tokens // seq_length, self._whole)
        self.seq_length, self.sha256, self.boundaries = seq_length, sha256, boundaries

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        """Sequence ``index``."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        first = index * self._whole // self._length * self.seq_length
        ids = self._ids(first, first + self.seq_length + 1)
        text = torch.from_numpy(ids)
        sample = {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(self.seq_length),
            "position_ids": torch.arange(self.seq_length),
        }
        return sample if self.boundaries is None else self.boundaries.marked(sample)

    def _ids(self, first: int, end: int) -> np.ndarray:
        """Ids ``first`` to ``end`` of the concatenated pairs, int64 [end - first]."""
        found = []
        for pair, begin, behind in zip(
            self._pairs, self._begins[:-1].tolist(), self._begins[1:].tolist(), strict=True
        ):
            low, high = max(first, begin), min(end, behind)
            if low < high:
                dtype = pair.index.dtype
                at = (low - begin) * np.dtype(dtype).itemsize
                ids = pair.bin_reader.read(dtype=dtype, count=high - low, offset=at)
                found.append(ids.astype(np.int64))
        return np.concatenate(found)


def held_out(
    recipe: Recipe, run_dir: Path, tokens: int, *, plain: bool = False
) -> dict[str, HeldOutText]:
    """Every domain's held-out text in the recipe's order, with its boundaries of documents.

    Args:
        recipe: the run's.
        run_dir: its directory.
        tokens: of each domain at most.
        plain: without the boundaries, as models outside of Megatron read it.

    Raises:
        UserError: a domain has no whole sequence of it.
    """
    found = {}
    marks = (
        None
        if plain
        else boundaries_of(recipe, load_tokenizer(run_dir / "prepare" / "tokenizer").eos_id)
    )
    for domain in recipe.domains:
        split = tokenized_split(run_dir, domain, "valid")
        where = prefix(run_dir, domain, "valid")
        text = HeldOutText(
            [pair for pair, _ in pairs(where, split)],
            recipe.model.seq_length,
            tokens,
            split.sha256,
            marks,
        )
        found[domain] = text
        if not len(text):
            raise UserError(
                f"domains.{domain}.valid",
                f"holds less than one sequence of {recipe.model.seq_length} tokens",
                "give it more text",
            )
    return found
