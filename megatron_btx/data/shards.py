"""Text to token ids in independent, resumable shards, with the same result on any machine.

A shard consists of parts of files (:class:`~megatron_btx.data.formats.Part`). Its output is in a
hidden directory beside the pair that it becomes a part of: ``N.<split>.bin`` with the ids,
``N.<split>.lengths`` (int32), and ``N.json``, which is written last. Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_btx.data.documents import no_document
from megatron_btx.data.formats import Part, format_of, token_pair
from megatron_btx.data.formats.compression import compression_of
from megatron_btx.data.parallel import advance
from megatron_btx.data.tokenizer import Tokenizer, load_tokenizer
from megatron_btx.files import find_json, unfinished, write_json

_BATCH = 1_000_000
"""Characters that are tokenized at once."""
HELD_OUT = 50
"""One document in this many is held out of a domain without ``valid:``."""
_tokenizer: Tokenizer | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The work that a process does at a time."""

    parts: tuple[Part, ...]
    text_key: str
    splits: tuple[str, ...]
    """Its split; ``train`` and ``valid`` if held-out text is to be separated."""
    in_place: bool
    """Whether its ids, those of a Megatron pair, are used where they are: checked and counted."""
    count_bytes: bool
    """Whether such a pair is decoded to count its bytes of text."""
    place: Path
    """Path of its output files without their endings."""
    key: str
    """Hash of its inputs and of the tokenizer."""
    size: int
    """Approximate bytes of input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Totals of a split in a shard."""

    documents: int = 0
    tokens: int = 0
    bytes: int | None = 0
    sha256: str = ""
    """Of the ids of a pair that is used in place."""


def cut(files: Sequence[Path], size: int) -> list[tuple[tuple[Part, ...], int]]:
    """Divide ``files`` into shards: the parts of each, in order, and its approximate bytes, at most
    about ``size``. Small files share a shard; compressed files are not divided."""
    shards: list[tuple[tuple[Part, ...], int]] = []
    held: list[Part] = []
    weight = 0
    for file in files:
        parts = format_of(file).split(file, size)
        each = weigh(file) // max(len(parts), 1)
        for part in parts:
            if held and weight + each > size:
                shards.append((tuple(held), weight))
                held, weight = [], 0
            held.append(part)
            weight += each
    return [*shards, (tuple(held), weight)] if held else shards


def weigh(file: Path) -> int:
    """Approximate bytes of text in a file."""
    if format_of(file) is token_pair:
        return file.with_suffix(".bin").stat().st_size
    ratio = 4 if compression_of(file) is not None else 1  # a guess
    return file.stat().st_size * ratio


def set_up(directory: Path, threads: int) -> None:
    """Prepare a process for :func:`make`: load the tokenizer, limit its threads (0: no limit)."""
    global _tokenizer
    if threads:  # also followed for SentencePiece (tokenizer_sentencepiece)
        os.environ["RAYON_NUM_THREADS"] = str(threads)
    _tokenizer = load_tokenizer(directory)


def read(shard: Shard) -> dict[str, Counts] | None:
    """Totals of a finished shard by split; ``None`` if it is unfinished or has another key."""
    found = find_json(_file(shard, "json"))
    if found is None or found.get("key") != shard.key:
        return None
    try:
        return {split: Counts(**found["splits"][split]) for split in shard.splits}
    except (KeyError, TypeError):
        return None


def make(shard: Shard) -> dict[str, Counts]:
    """Read, tokenize and write a shard.

    Raises:
        UserError: its text cannot be read; the message names file and line.
    """
    assert _tokenizer is not None
    shard.place.parent.mkdir(parents=True, exist_ok=True)
    if shard.in_place:
        counts = {shard.splits[0]: _check(shard, _tokenizer)}
    else:
        counts = _write(shard, _tokenizer)
    splits = {split: asdict(count) for split, count in counts.items()}
    write_json(_file(shard, "json"), {"key": shard.key, "splits": splits})
    return counts


def ids_file(shard: Shard, split: str) -> Path:
    """The file of its ids, in :func:`dtype_of` the tokenizer."""
    return _file(shard, f"{split}.bin")


def lengths_file(shard: Shard, split: str) -> Path:
    """The file of its documents' lengths, int32."""
    return _file(shard, f"{split}.lengths")


def dtype_of(tokenizer: Tokenizer) -> type[np.unsignedinteger[Any]] | type[np.signedinteger[Any]]:
    """The dtype of stored ids: uint16 if the vocabulary fits, else int32 (as Megatron's
    ``DType.optimal_dtype``)."""
    return np.uint16 if tokenizer.vocab_size < 65500 else np.int32


class _Output:
    """The files of one split of a shard."""

    def __init__(self, shard: Shard, split: str, dtype: Any, end: int) -> None:
        self._files = [ids_file(shard, split), lengths_file(shard, split)]
        self._dtype, self._end = dtype, np.array([end], np.int32)
        self._streams: list[IO[bytes]] = [unfinished(file).open("wb") for file in self._files]
        self.documents = self.tokens = self.bytes = 0

    def add(self, rows: Sequence[np.ndarray], sizes: Sequence[int]) -> None:
        """Write documents: their ids without end token, and their bytes of text."""
        if not rows:
            return
        lengths = np.array([len(row) + 1 for row in rows], np.int32)
        ids = np.concatenate([piece for row in rows for piece in (row, self._end)])
        self._streams[0].write(ids.astype(self._dtype).tobytes())
        self._streams[1].write(lengths.tobytes())
        self.documents += len(rows)
        self.tokens += len(ids)
        self.bytes += sum(sizes)

    def close(self, *, whole: bool) -> None:
        """Close the files; give them their names if they are complete, else delete them."""
        for stream, file in zip(self._streams, self._files, strict=True):
            stream.close()
            if whole:
                os.replace(unfinished(file), file)
            else:
                unfinished(file).unlink(missing_ok=True)


def _write(shard: Shard, tokenizer: Tokenizer) -> dict[str, Counts]:
    _file(shard, "json").unlink(missing_ok=True)
    dtype = dtype_of(tokenizer)
    outputs = {split: _Output(shard, split, dtype, tokenizer.eos_id) for split in shard.splits}
    of_pairs = any(format_of(part.file) is token_pair for part in shard.parts)
    whole = False
    try:
        for batch in _batches(shard, tokenizer):
            for split, output in outputs.items():
                mine = [row for row in batch if len(shard.splits) == 1 or split_of(row[0]) == split]
                output.add([ids for _, _, ids in mine], [size for _, size, _ in mine])
        whole = True
    finally:
        for output in outputs.values():
            output.close(whole=whole)
    return {
        split: Counts(
            documents=out.documents,
            tokens=out.tokens,
            bytes=None if of_pairs and split == "train" else out.bytes,
        )
        for split, out in outputs.items()
    }


Row = tuple[bytes, int, np.ndarray]
"""A document: its content (UTF-8 of its text, or its ids), bytes of text, ids int32 [n]."""


def _batches(shard: Shard, tokenizer: Tokenizer) -> Iterator[list[Row]]:
    """Documents with their ids; those without ids are left out."""
    for texts in _gathered(_texts(shard)):
        rows = tokenizer.encode(texts)
        encoded = [text.encode() for text in texts]
        advance(sum(map(len, encoded)))
        yield [(text, len(text), ids) for text, ids in zip(encoded, rows, strict=True) if len(ids)]
    for part in shard.parts:
        if format_of(part.file) is token_pair:
            yield from _pair_rows(part, tokenizer)


def _texts(shard: Shard) -> Iterator[str]:
    for part in shard.parts:
        form = format_of(part.file)
        if form is token_pair:
            continue
        count = 0
        for _, text in form.read(part, shard.text_key):
            yield text
            count += 1
        if not count and part == Part(part.file):
            raise no_document(part.file)


def _gathered(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pair_rows(part: Part, tokenizer: Tokenizer) -> Iterator[list[Row]]:
    pair = token_pair.TokenPair(part.file)
    pair.check_ids(tokenizer.eos_id, tokenizer.vocab_size, part.begin, part.end)
    rows: list[Row] = []
    for ids in pair.documents(part.begin, part.end):
        plain = ids[:-1].astype(np.int32)
        if len(plain):
            key = plain.tobytes()
            size = _text_bytes(plain, tokenizer) if split_of(key) == "valid" else 0
            rows.append((key, size, plain))
        if len(rows) >= 1000:
            advance(sum(row[2].nbytes for row in rows))
            yield rows
            rows = []
    yield rows


def _text_bytes(ids: np.ndarray, tokenizer: Tokenizer) -> int:
    return len(tokenizer.decode(ids).encode("utf-8", "surrogatepass"))


def _check(shard: Shard, tokenizer: Tokenizer) -> Counts:
    (part,) = shard.parts
    pair = token_pair.TokenPair(part.file)
    tokens = pair.check_ids(tokenizer.eos_id, tokenizer.vocab_size, part.begin, part.end)
    digest, documents, size = hashlib.sha256(), 0, 0
    for ids in pair.documents(part.begin, part.end):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.tobytes())
        documents += 1
        if shard.count_bytes:
            size += _text_bytes(ids[:-1].astype(np.int32), tokenizer)
    advance(tokens * pair.dtype.itemsize)
    counted = size if shard.count_bytes else None
    return Counts(documents=documents, tokens=tokens, bytes=counted, sha256=digest.hexdigest())


def split_of(document: bytes) -> str:
    """The split of a document, by a hash of its content: equal documents are in the same split."""
    number = int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big")
    return "valid" if number % HELD_OUT == 0 else "train"


def _file(shard: Shard, ending: str) -> Path:
    return shard.place.with_name(f"{shard.place.name}.{ending}")
