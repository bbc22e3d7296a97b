"""The samples of a training stage, read through Megatron's datasets.

A sample is identified by its global index: step * global_batch_size + index in the batch. Which
sample has which index depends on the recipe alone, not on the layout or on resuming, because the
numbers of samples that Megatron's shuffles depend on are those of the whole stage.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_btx.data.boundaries import Boundaries, boundaries_of
from megatron_btx.data.heldout_sequences import Sample
from megatron_btx.data.prepare import prefix, tokenized_split
from megatron_btx.data.tokenized import pairs
from megatron_btx.data.tokenizer import Tokenizer, load_tokenizer
from megatron_btx.files import sweep, unfinished
from megatron_btx.recipe import count
from megatron_btx.recipe.schema import Recipe, Training
from megatron_btx.recipe.stages import MixturePart, directory, reads, training


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """One mixture of domains, from its first sample to its last.

    Every stage that reads it builds it from the same numbers and so reads the same samples.
    """

    name: str
    """Of the stage it was made for, which seeds its shuffles together with the random seed."""
    samples: int
    """Of the whole stage; Megatron's order depends on it."""
    domains: tuple[int, ...]
    """For each dataset of the blend, the index of its domain in the recipe; a domain of several
    pairs has several datasets."""
    dataset: Any
    """Megatron's ``BlendedDataset``, or ``GPTDataset`` if there is only one."""

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``, with the index of its domain in the recipe as ``domains``, int64 []."""
        sample = self.dataset[index]
        sample["domains"] = torch.tensor(self.domains[int(sample.pop("dataset_id", 0))])
        return sample


class Interleaved:
    """All elements of sequences of the given ``sizes``, each sequence spread evenly over the whole.

    Element j of a sequence of n elements has the position (j + 1/2) / n; of equal positions the
    first sequence's comes first. Positions are computed, not stored: a run of 500 billion tokens
    has 10^8 samples, and an array of their order would take a gigabyte on every rank.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self._length = sum(self.sizes)

    def __len__(self) -> int:
        return self._length

    def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The sequence, and the element of it, at the places ``first``, ``first + 1``, ...

        Args:
            first: a place (from 0).
            count: how many.

        Returns:
            Two int64 arrays [count]: sequences and elements.
        """
        assert 0 <= first <= self._length - count
        # About n t elements of each sequence have a position below t; the margin covers rounding.
        margin = len(self.sizes) + 1
        begin, end = (first - margin) / self._length, (first + count + margin) / self._length
        lows, keys, sequences = [], [], []
        for sequence, size in enumerate(self.sizes):
            low = max(0, math.floor(begin * size) - 1)
            high = min(size, math.ceil(end * size) + 1)
            lows.append(low)
            keys.append((np.arange(low, high) + 0.5) / max(size, 1))
            sequences.append(np.full(high - low, sequence))
        elements = np.concatenate(
            [low + np.arange(len(k)) for low, k in zip(lows, keys, strict=True)]
        )
        order = np.argsort(np.concatenate(keys), kind="stable")
        chosen = order[first - sum(lows) :][:count]
        return np.concatenate(sequences)[chosen], elements[chosen]


@dataclass(frozen=True, kw_only=True)
class StageData:
    """All samples of a training stage in order, and this rank's part of each step."""

    groups: Sequence[Sequence[Mixture]]
    """Read one after the other; the mixtures of a group are interleaved in proportion."""
    training: Training
    """Batch sizes and layout."""
    boundaries: Boundaries
    """Of documents."""

    @property
    def num_microbatches(self) -> int:
        """Micro-batches per step on every data-parallel rank."""
        size = self.training.micro_batch_size * self.training.layout.data_parallel_size
        return self.training.global_batch_size // size

    def __len__(self) -> int:
        """Samples of all mixtures."""
        return sum(mixture.samples for group in self.groups for mixture in group)

    def locate(self, first: int, number: int) -> list[tuple[Mixture, int]]:
        """Mixture and sample within it of ``number`` consecutive global indices.

        Past the end, in a last step that the tokens do not fill, the last group starts again.
        """
        found: list[tuple[Mixture, int]] = []
        begin = 0
        for place, group in enumerate(self.groups):
            order = Interleaved([mixture.samples for mixture in group])
            last = place == len(self.groups) - 1
            while number and (first < begin + len(order) or last):
                inside = (first - begin) % len(order)
                here = min(number, len(order) - inside)
                which, index = order.locate(inside, here)
                found += [(group[w], int(i)) for w, i in zip(which, index, strict=True)]
                first, number = first + here, number - here
            begin += len(order)
        return found

    def batches(self, step: int, data_parallel_rank: int | None = None) -> Iterator[Sample]:
        """This data-parallel rank's micro-batches of a step (from 0), as Megatron's pretraining
        sampler distributes them: consecutive blocks of micro_batch_size, rank by rank.

        Yields:
            On this rank's device ``tokens``, ``labels``, ``position_ids`` int64 [B, S],
            ``loss_mask`` float32 [B, S], ``samples`` (global indices) and ``domains`` int64 [B];
            and what :meth:`~megatron_btx.data.boundaries.Boundaries.marked` adds.
        """
        size, dp = self.training.micro_batch_size, self.training.layout.data_parallel_size
        rank = data_parallel_rank
        if rank is None:
            rank = parallel_state.get_data_parallel_rank()
        for micro in range(self.num_microbatches):
            first = step * self.training.global_batch_size + (micro * dp + rank) * size
            batch = _stack([mixture[index] for mixture, index in self.locate(first, size)], first)
            yield self.boundaries.marked(batch)


def _stack(samples: Sequence[Sample], first: int) -> Sample:
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    batch["samples"] = torch.arange(first, first + len(samples))
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def stage_data(recipe: Recipe, name: str, run_dir: Path) -> StageData:
    """The training samples of stage ``name``. Every rank calls it; the first builds Megatron's
    indices, which are cached in the stage's directory.

    Raises:
        UserError: the stage's text is missing.
    """
    index = directory(run_dir, name) / "index"
    groups = [
        [_mixture(recipe, part, run_dir, index) for part in group] for group in reads(recipe, name)
    ]
    return StageData(
        groups=groups,
        training=training(recipe, name),
        boundaries=boundaries_of(recipe, load_tokenizer(run_dir / "prepare" / "tokenizer").eos_id),
    )


def _mixture(recipe: Recipe, part: MixturePart, run_dir: Path, index: Path) -> Mixture:
    samples = count.steps(part.block, recipe.model) * part.block.global_batch_size
    mixture = count.mixture(part.block.data)
    splits = {domain: tokenized_split(run_dir, domain, "train") for domain in mixture}
    names = list(recipe.domains)
    blend: list[tuple[str, float]] = []
    domains: list[int] = []
    for domain, split in splits.items():
        for pair, share in pairs(prefix(run_dir, domain, "train"), split):
            blend.append((str(pair), mixture[domain] * share))
            domains.append(names.index(domain))
    dataset = _build(
        index,
        blend=blend,
        contents=[split.sha256 for split in splits.values()],
        samples=samples,
        seed=_seed(recipe.random_seed, part.stage),
        seq_length=recipe.model.seq_length,
        facts=_Facts(load_tokenizer(run_dir / "prepare" / "tokenizer")),
    )
    return Mixture(name=part.stage, samples=samples, domains=tuple(domains), dataset=dataset)


class _Facts:
    """What Megatron's datasets ask of a tokenizer. It names no padding: there is none to mask."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eod = tokenizer.eos_id
        self.vocab_size = tokenizer.vocab_size
        self.unique_identifiers = {"sha256": tokenizer.sha256}


def _build(
    index: Path,
    *,
    blend: Sequence[tuple[str, float]],
    contents: Sequence[str],
    samples: int,
    seed: int,
    seq_length: int,
    facts: _Facts,
) -> BlendedDataset | GPTDataset:
    """Megatron's dataset of ``samples`` samples of a mixture, its indices cached below ``index``.

    Megatron writes index files under their final names and later trusts any file of that name. So
    they are built in a directory that gets its name when all of them are there; ``contents`` (the
    text's hashes) are part of that name.
    """
    key = [list(map(list, blend)), list(contents), samples, seed, seq_length]
    cache = index / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    with _one_rank_at_least():
        first = dist.get_rank() == 0
        building = [str(cache if cache.is_dir() else unfinished(cache))]
        dist.broadcast_object_list(building, src=0)  # the first rank decides for all
        path = Path(building[0])
        if first and path != cache:
            sweep(index)
            path.mkdir(parents=True)
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            blend_per_split=[tuple(map(list, zip(*blend, strict=True))), None, None],
            path_to_cache=str(path),
            tokenizer=facts,
            reset_position_ids=False,  # these are boundaries.py's
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        sizes = [samples, 0, 0]
        dataset = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]
        dist.barrier()
        if first and path != cache:
            os.replace(path, cache)  # what the ranks have mapped stays mapped
    return dataset


@contextmanager
def _one_rank_at_least() -> Iterator[None]:
    """Megatron's BlendedDataset asks for the rank even where there are no ranks: one is made."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _seed(random_seed: int, name: str) -> int:
    """A seed per stage, so that two experts sample different general text; 32 bits for NumPy."""
    return int.from_bytes(hashlib.sha256(f"{random_seed}/data/{name}".encode()).digest()[:4], "big")
