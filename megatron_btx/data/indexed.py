"""Megatron's ``.bin`` / ``.idx`` pairs as a run has them: joined by Megatron's own builder."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_btx.data.shards import Counts, Shard, ids_file, lengths_file
from megatron_btx.data.tokenized import TokenizedSplit, beside, write_tokenized
from megatron_btx.files import unfinished

_BLOCK = 1 << 22


def join(
    prefix: Path, shards: Sequence[Shard], split: str, dtype: Any, *, key: str, size: int | None
) -> TokenizedSplit:
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
    beside(prefix, "json").unlink(missing_ok=True)  # from here the old pair is not whole any more
    temporary = {kind: unfinished(beside(prefix, kind)) for kind in ("bin", "idx")}
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
            os.replace(path, beside(prefix, kind))
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return write_tokenized(
        prefix,
        TokenizedSplit(
            key=key, documents=documents, tokens=tokens, bytes=size, sha256=digest.hexdigest()
        ),
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
