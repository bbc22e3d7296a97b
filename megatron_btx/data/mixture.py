"""What a training stage reads, sample by sample, through Megatron's own datasets.

A sample's place in the run is its global index: step * global_batch_size + place in the batch. What
lies there depends on the recipe alone, never on the layout or on where a run was resumed: the sizes
that Megatron's shuffles depend on are those of the whole stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megatron_btx.data.tokenizer import load_tokenizer
from megatron_btx.errors import UserError
from megatron_btx.recipe import count
from megatron_btx.recipe.schema import Recipe, Training
from megatron_btx.recipe.stages import directory, training

Sample = dict[str, Tensor]
"""``tokens``, ``labels``, ``position_ids`` int64 [S] and ``loss_mask`` float32 [S]."""


class _TokenizerFacts:
    """What Megatron's datasets ask of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.eod = tokenizer.eos_id
        self.vocab_size = tokenizer.vocab_size
        self.unique_identifiers = {"sha256": tokenizer.sha256}


@dataclass(frozen=True, kw_only=True)
class Stream:
    """All samples of one training stage in their order, and this rank's part of each step.

    Args:
        parts: the datasets that are read.
        order: for every global index (which part, which sample of it), int32 [n, 2]; ``None``:
            ``parts[0]`` from its beginning.
        training: batch sizes.
    """

    parts: Sequence[Any]
    order: np.ndarray | None
    training: Training

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that every data-parallel rank runs a step."""
        size = self.training.micro_batch_size * self.training.layout.data_parallel_size
        return self.training.global_batch_size // size

    def sample(self, index: int) -> Sample:
        """The sample at a global index; behind the last one it begins anew (a last step that the
        tokens do not fill)."""
        if self.order is None:
            return self.parts[0][index % len(self.parts[0])]
        part, inner = self.order[index % len(self.order)]
        return self.parts[part][int(inner)]

    def batches(self, step: int) -> Iterator[Sample]:
        """This data-parallel rank's micro-batches of a step (from 0), as Megatron's pretraining
        sampler deals them out: consecutive blocks of micro_batch_size, rank by rank.

        Yields:
            A batch [B, S] with ``samples`` [B]: global indices, int64.
        """
        size, dp = self.training.micro_batch_size, self.training.layout.data_parallel_size
        rank = parallel_state.get_data_parallel_rank()
        device = torch.cuda.current_device()
        for micro in range(self.num_microbatches):
            first = step * self.training.global_batch_size + (micro * dp + rank) * size
            yield stack([self.sample(first + row) for row in range(size)], first, device)


def stack(samples: Sequence[Sample], first: int, device: Any) -> Sample:
    """Samples at consecutive global indices as one batch on a device."""
    keys = ("tokens", "labels", "loss_mask", "position_ids")
    batch = {key: torch.stack([sample[key] for sample in samples]).to(device) for key in keys}
    batch["samples"] = torch.arange(first, first + len(samples), device=device)
    return batch


def stage_stream(recipe: Recipe, name: str, run_dir: Path) -> Stream:
    """What stage ``name`` trains on. Every rank calls it; indices are built by the first and cached
    in the stage's directory.

    The dense baseline is data-matched (section 4.1.2 of the paper): first the very samples that the
    experts saw, interleaved in proportion, then the finetuning's samples in its order.

    Raises:
        UserError: the stage's text is missing.
    """
    settings = training(recipe, name)
    cache = directory(run_dir, name) / "index"
    if name != "dense":
        with _whole(cache):
            return Stream(
                parts=[_dataset(recipe, name, run_dir, cache)], order=None, training=settings
            )
    experts = [f"expert:{domain}" for domain, block in recipe.experts.items() if block.tokens]
    with _whole(cache):
        parts = [_dataset(recipe, part, run_dir, cache) for part in (*experts, "finetune")]
    sizes = [_samples(recipe, part) for part in (*experts, "finetune")]
    return Stream(parts=parts, order=matched_order(sizes[:-1], sizes[-1]), training=settings)


def matched_order(experts: Sequence[int], finetune: int) -> np.ndarray:
    """The dense baseline's order, int32 [sum, 2]: all of the experts' samples, those of every expert
    evenly spread over the first phase, then the finetuning's.

    Args:
        experts: samples of each expert.
        finetune: samples of the finetuning, the last part.
    """
    first = [_column(part, size) for part, size in enumerate(experts)]
    when = [(np.arange(size) + 0.5) / max(size, 1) for size in experts]
    places = np.concatenate(first or [_column(0, 0)])
    spread = np.argsort(np.concatenate(when or [np.zeros(0)]), kind="stable")
    return np.concatenate([places[spread], _column(len(experts), finetune)])


def _column(part: int, size: int) -> np.ndarray:
    return np.stack([np.full(size, part), np.arange(size)], axis=1).astype(np.int32)


def _samples(recipe: Recipe, name: str) -> int:
    block = training(recipe, name)
    return count.steps(block, recipe.model) * block.global_batch_size


def _dataset(recipe: Recipe, name: str, run_dir: Path, cache: Path) -> Any:
    """Megatron's blended dataset of a stage's mixture, as long as the stage."""
    mixture = count.mixture(training(recipe, name).data)
    prefixes = [str(_prefix(run_dir, domain, "train")) for domain in mixture]
    config = GPTDatasetConfig(
        random_seed=recipe.random_seed,
        sequence_length=recipe.model.seq_length,
        blend=(prefixes, list(mixture.values())),
        split="100,0,0",
        path_to_cache=str(cache),
        tokenizer=_TokenizerFacts(load_tokenizer(run_dir / "prepare" / "tokenizer")),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [_samples(recipe, name), 0, 0]
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]


def _prefix(run_dir: Path, domain: str, split: str) -> Path:
    prefix = run_dir / "prepare" / "data" / domain / split
    if not prefix.with_name(split + ".idx").exists():
        raise UserError(f"domains.{domain}", f"{prefix}.idx is missing", "run stage prepare first")
    return prefix


class _whole:
    """A cache directory that is used again only if it was finished: Megatron writes its index files
    under their final names."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.mark = cache, cache / "whole"

    def __enter__(self) -> None:
        if self._first() and not self.mark.exists():
            shutil.rmtree(self.cache, ignore_errors=True)
            self.cache.mkdir(parents=True)
        if dist.is_initialized():
            dist.barrier()

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None and self._first():
            self.mark.touch()

    @staticmethod
    def _first() -> bool:
        return not dist.is_initialized() or dist.get_rank() == 0


class HeldOutText(Sequence[Sample]):
    """A domain's held-out text as whole sequences, one after the other, read as they are asked for.

    Args:
        prefix: of its .bin and .idx files.
        seq_length: S.
        tokens: at most this many.
    """

    def __init__(self, prefix: Path, seq_length: int, tokens: int) -> None:
        documents = IndexedDataset(str(prefix))
        most = min(tokens // seq_length, (int(documents.sequence_lengths.sum()) - 1) // seq_length)
        pieces, length = [], 0
        for index in range(len(documents)):
            if length > most * seq_length:
                break
            pieces.append(np.asarray(documents[index], dtype=np.int64))
            length += len(pieces[-1])
        self.seq_length, self._length = seq_length, max(0, most)
        self._text = torch.from_numpy(np.concatenate(pieces)) if pieces else torch.zeros(0).long()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._length:
            raise IndexError(index)
        first = index * self.seq_length
        return {
            "tokens": self._text[first : first + self.seq_length],
            "labels": self._text[first + 1 : first + self.seq_length + 1],
            "loss_mask": torch.ones(self.seq_length),
            "position_ids": torch.arange(self.seq_length),
        }


def held_out(recipe: Recipe, run_dir: Path, tokens: int) -> Mapping[str, HeldOutText]:
    """Every domain's held-out text, at most ``tokens`` each, in the recipe's order.

    Raises:
        UserError: a domain has no whole sequence of it.
    """
    found = {}
    for domain in recipe.domains:
        text = HeldOutText(_prefix(run_dir, domain, "valid"), recipe.model.seq_length, tokens)
        if not len(text):
            raise UserError(
                f"domains.{domain}.valid",
                f"holds less than one sequence of {recipe.model.seq_length} tokens",
                "give it more text",
            )
        found[domain] = text
    return found
