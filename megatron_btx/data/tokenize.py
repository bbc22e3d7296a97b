"""A run's text to .bin/.idx pairs: shards are tokenized on all cores, and joined to pairs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_btx.data import Progress
from megatron_btx.data.domain_text import DomainText, Group, digest
from megatron_btx.data.formats import Part
from megatron_btx.data.indexed import join, total
from megatron_btx.data.parallel import cores, run_all
from megatron_btx.data.shards import Counts, Shard, cut, dtype_of, make, read, set_up
from megatron_btx.data.tokenized import TokenizedSplit, read_tokenized, write_tokenized
from megatron_btx.data.tokenizer import Tokenizer
from megatron_btx.errors import UserError

SHARD = 64 << 20
"""Bytes of input of a shard; if all input is smaller, no processes are started."""


@dataclass(frozen=True, kw_only=True)
class TokenizeJob:
    """A group of files that become pairs, one for each split."""

    domain: str
    text: DomainText
    group: Group
    splits: tuple[str, ...]
    names: dict[str, str]
    """Names of the pairs by split: ``train``, or ``train.0`` if there are several."""
    directory: Path

    @property
    def in_place(self) -> bool:
        """Whether it is a Megatron pair that is used in place."""
        return self.group.is_pair and not self.text.is_split

    def key(self, split: str, tokenizer: Tokenizer) -> str:
        """The key of the pair of a split."""
        return digest([self.text.key(split, self.group.files), tokenizer.identity])

    def shards(self, tokenizer: Tokenizer) -> list[Shard]:
        """Its shards, in order."""
        key = digest([self.key(split, tokenizer) for split in self.splits] + [SHARD])
        place = self.directory / f".shards-{'-'.join(self.names.values())}"
        return [
            Shard(
                parts=parts,
                text_key=self.text.text_key,
                splits=self.splits,
                in_place=self.in_place,
                count_bytes="valid" in self.splits,
                place=place / f"{number:06d}",
                key=digest([key, number]),
                size=size,
            )
            for number, (parts, size) in enumerate(_cut(self))
        ]


def _cut(job: TokenizeJob) -> list[tuple[tuple[Part, ...], int]]:
    shards = cut(job.group.files, SHARD)
    if not job.in_place:
        return shards
    return [((part,), size // len(parts)) for parts, size in shards for part in parts]


def jobs(text: DomainText, directory: Path) -> list[TokenizeJob]:
    """The jobs of a domain, whose pairs are written to ``directory``."""
    made = []
    for splits in (("train", "valid"),) if text.is_split else (("train",), ("valid",)):
        groups = text.groups(splits[0])
        alone = len(groups) == 1 and (text.is_split or not groups[0].is_pair)
        for number, group in enumerate(groups):
            names = {split: split if alone else f"{split}.{number}" for split in splits}
            made.append(
                TokenizeJob(
                    domain=text.name,
                    text=text,
                    group=group,
                    splits=splits,
                    names=names,
                    directory=directory,
                )  # fmt: skip
            )
    return made


def run(
    jobs: Sequence[TokenizeJob],
    tokenizer_dir: Path,
    tokenizer: Tokenizer,
    progress: Progress,
    share: tuple[int, int] | None = None,
) -> int:
    """Make every pair that does not exist yet.

    Args:
        jobs: of all domains.
        tokenizer_dir: the directory of ``tokenizer``.
        tokenizer: the run's.
        progress: told how far it is.
        share: (i, n): make only the shards of share i (from 0) of n, and join nothing. The n shares
            together contain every shard.

    Returns:
        The number of shards in this share.

    Raises:
        UserError: some text cannot be read; finished shards are kept.
    """
    work = {number: job.shards(tokenizer) for number, job in enumerate(jobs)
            if not _is_done(job, tokenizer)}  # fmt: skip
    mine = _dealt(work, *(share or (0, 1)))
    todo = [(number, place) for number, place in mine if read(work[number][place]) is None]
    missing = {number: sum(each == number for each, _ in todo) for number in work}

    def join_whole(number: int) -> None:
        if share is None and not missing[number]:
            _join(jobs[number], work[number], tokenizer)

    for number in work:
        join_whole(number)
    shards = [work[number][place] for number, place in todo]
    for index in _made(shards, tokenizer_dir, progress):
        number, _ = todo[index]
        missing[number] -= 1
        join_whole(number)
    return len(mine)


def _dealt(work: dict[int, list[Shard]], share: int, of: int) -> list[tuple[int, int]]:
    """(job, index of its shard) of the shards of a share. Large ones are distributed first, to
    balance the shares."""
    every = [(number, place) for number, shards in work.items() for place in range(len(shards))]
    if of > 1:
        every.sort(key=lambda each: -work[each[0]][each[1]].size)
    return sorted(every[share::of])


def _made(shards: Sequence[Shard], tokenizer_dir: Path, progress: Progress) -> Iterator[int]:
    """Make ``shards``; yields the index of each when it is finished."""
    size = sum(shard.size for shard in shards)
    workers = min(cores(), len(shards)) if size > SHARD else 1
    meter = _Meter(size, progress)
    threads = max(1, cores() // workers) if workers > 1 else 0
    ended = run_all(
        make, shards, workers=workers, setup=set_up, arguments=(tokenizer_dir, threads),
        watch=meter.read,
    )  # fmt: skip
    for index, _ in ended:
        meter.finished(shards[index].size)
        yield index


def finish(
    text: DomainText, split: str, jobs: Sequence[TokenizeJob], directory: Path
) -> TokenizedSplit:
    """Record a split that consists of the pairs of its jobs; files of former pairs are deleted."""
    prefix = directory / split
    made = [read_tokenized(directory / job.names[split]) for job in jobs]
    found = [one for one in made if one is not None]
    assert len(found) == len(jobs)  # run made them
    whole = found[0]
    if split == "train" and text.domain.weights:
        _refuse_empty(text, jobs, found)
    if jobs[0].names[split] != split:
        counts = total([
            Counts(documents=p.documents, tokens=p.tokens, bytes=p.bytes, sha256=p.sha256)
            for p in found
        ])  # fmt: skip
        shares = text.shares(split, [job.group for job in jobs], [p.tokens for p in found])
        whole = TokenizedSplit(
            key=digest([[one.key for one in found], shares]),
            documents=counts.documents,
            tokens=counts.tokens,
            bytes=counts.bytes,
            sha256=counts.sha256,
            blend=tuple((job.names[split], s) for job, s in zip(jobs, shares, strict=True)),
        )
        write_tokenized(prefix, whole)
    mine = {job.names[split] for job in jobs}
    for file in directory.glob(f"{split}.*"):
        ours = mine | {split} if file.suffix == ".json" else mine
        if file.suffix in (".bin", ".idx", ".json") and file.stem not in ours:
            file.unlink()
    return whole


def _refuse_empty(
    text: DomainText, jobs: Sequence[TokenizeJob], made: Sequence[TokenizedSplit]
) -> None:
    """That no path has a weight and no tokens."""
    tokens = [0] * len(text.domain.train)
    for job, one in zip(jobs, made, strict=True):
        tokens[job.group.path] += one.tokens
    if 0 in tokens:
        where, path = f"domains.{text.name}.weights", text.domain.train[tokens.index(0)]
        what = f"{path} has a weight, and holds no tokens"
        raise UserError(where, what, "remove it from `train:`, or give it text")


def _is_done(job: TokenizeJob, tokenizer: Tokenizer) -> bool:
    return all(
        read_tokenized(job.directory / job.names[split], job.key(split, tokenizer)) is not None
        for split in job.splits
    )


def _join(job: TokenizeJob, shards: Sequence[Shard], tokenizer: Tokenizer) -> None:
    counts = [read(shard) for shard in shards]
    for split in job.splits:
        prefix, key = job.directory / job.names[split], job.key(split, tokenizer)
        whole = total([count[split] for count in counts if count is not None])
        if job.in_place:
            file = job.group.files[0].resolve().with_suffix("")
            write_tokenized(
                prefix,
                TokenizedSplit(
                    key=key,
                    documents=whole.documents,
                    tokens=whole.tokens,
                    bytes=whole.bytes,
                    sha256=whole.sha256,
                    prefix=str(file),
                ),  # fmt: skip
            )
        elif read_tokenized(prefix, key) is None:
            join(prefix, shards, split, dtype_of(tokenizer), key=key, size=whole.bytes)
    shutil.rmtree(shards[0].place.parent)


class _Meter:
    """Reports the progress of all shards."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress = max(total, 1), progress
        self._begin = time.monotonic()
        self._read = self._finished = 0

    def read(self, amount: int) -> None:
        """``amount`` more bytes of text have been tokenized."""
        self._read += amount
        done = min(max(self._read, self._finished) / self._total, 0.99)
        seconds = time.monotonic() - self._begin
        if seconds <= 2 or not self._read:
            self._progress("tokens", done)
            return
        rate, left = self._read / seconds, seconds / done - seconds
        what = f"tokens at {rate / 1e6:.1f} MB/s, {_clock(left)} left,"
        self._progress(what, done, bytes_per_second=rate, seconds_left=left)

    def finished(self, size: int) -> None:
        """A shard of (estimated) ``size`` bytes is finished."""
        self._finished += size


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
