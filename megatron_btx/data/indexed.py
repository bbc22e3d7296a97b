"""Megatron's ``.bin`` / ``.idx`` pairs as a run has them: joined by Megatron's own builder."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_btx.data.shards import Counts, Shard, ids_file, lengths_file
from megatron_btx.files import find_json, unfinished, write_json

_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One split of a domain, or one of the pairs that make it up."""

    key: str
    """Hash of what it was made from."""
    documents: int
    tokens: int
    """An end-of-document token after each document included."""
    bytes: int | None
    """UTF-8 bytes of text; ``None``: not known, of training text that came as ids."""
    sha256: str
    """Of the ``.bin`` file; of several pairs, or one in place, of their content otherwise."""
    prefix: str | None = None
    """Of a pair of the user's, which stays where it is."""
    blend: tuple[tuple[str, float], ...] = ()
    """Of several pairs: their names in this directory, and the share of samples of each."""


def join(
    prefix: Path, shards: Sequence[Shard], split: str, dtype: Any, *, key: str, size: int | None
) -> Piece:
    """Write ``prefix.bin``, ``prefix.idx`` and last ``prefix.json``, which says they are whole,
    from finished shards. The files appear under their names when they are whole.

    Args:
        prefix: of the files.
        shards: in their order.
        split: which of theirs.
        dtype: of the ids.
        key: of the result.
        size: bytes of text.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    _beside(prefix, "json").unlink(missing_ok=True)  # from here the old pair is not whole any more
    temporary = {kind: unfinished(_beside(prefix, kind)) for kind in ("bin", "idx")}
    digest = hashlib.sha256()
    try:
        builder = IndexedDatasetBuilder(str(temporary["bin"]), dtype=dtype)
        # Megatron's lists take 36 bytes a number; these take 4 and 8.
        builder.sequence_lengths = array("i")
        for shard in shards:
            lengths = np.fromfile(lengths_file(shard, split), np.int32)
            builder.sequence_lengths.frombytes(lengths.tobytes())
            with ids_file(shard, split).open("rb") as ids:
                while block := ids.read(_BLOCK):
                    builder.data_file.write(block)
                    digest.update(block)
        documents = len(builder.sequence_lengths)
        builder.document_indices = array("q", range(documents + 1))
        tokens = int(np.frombuffer(builder.sequence_lengths, np.int32).sum(dtype=np.int64))
        builder.finalize(str(temporary["idx"]))
        for kind, path in temporary.items():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(path, _beside(prefix, kind))
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return write_piece(
        prefix,
        Piece(key=key, documents=documents, tokens=tokens, bytes=size, sha256=digest.hexdigest()),
    )


def total(counts: Sequence[Counts]) -> Counts:
    """Of several shards; the hash is that of their hashes."""
    sizes = [count.bytes for count in counts]
    return Counts(
        documents=sum(count.documents for count in counts),
        tokens=sum(count.tokens for count in counts),
        bytes=None if None in sizes else sum(size for size in sizes if size is not None),
        sha256=hashlib.sha256("".join(count.sha256 for count in counts).encode()).hexdigest(),
    )


def write_piece(prefix: Path, piece: Piece) -> Piece:
    """Write ``prefix.json``; what says nothing is left out."""
    content = {name: value for name, value in asdict(piece).items() if value or name == "bytes"}
    write_json(_beside(prefix, "json"), content)
    return piece


def read_piece(prefix: str | Path, key: str | None = None) -> Piece | None:
    """The finished piece at ``prefix``; ``None`` if it isn't finished or was made from other things
    (``key``)."""
    prefix = Path(prefix)
    try:
        found = find_json(_beside(prefix, "json")) or {}
        blend = tuple((str(name), float(share)) for name, share in found.pop("blend", ()))
        piece = Piece(**{"documents": 0, "tokens": 0, **found}, blend=blend)
    except (ValueError, TypeError):
        return None
    if key is not None and piece.key != key:
        return None
    if piece.blend:
        parts = [read_piece(prefix.with_name(name)) for name, _ in piece.blend]
        return piece if all(parts) else None
    there = prefix if piece.prefix is None else Path(piece.prefix)
    files = _beside(there, "bin").is_file() and _beside(there, "idx").is_file()
    return piece if files else None


def pairs(prefix: Path, piece: Piece) -> list[tuple[Path, float]]:
    """The pairs of the piece at ``prefix``, and the share of samples of each."""
    if not piece.blend:
        return [(prefix if piece.prefix is None else Path(piece.prefix), 1.0)]
    found = []
    for name, share in piece.blend:
        part = read_piece(prefix.with_name(name))
        assert part is not None  # read_piece looked
        found.append((pairs(prefix.with_name(name), part)[0][0], share))
    return found


def _beside(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{suffix}")
