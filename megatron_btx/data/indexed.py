"""Documents as Megatron's ``.bin`` / ``.idx`` pair, written by Megatron's own builder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_btx.data.tokenizer import Tokenizer
from megatron_btx.files import unfinished, write_json

_BATCH = 2_000_000
"""Characters that are tokenized at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One finished pair of files."""

    key: str
    """Hash of what it was made from."""
    documents: int
    tokens: int
    """An end-of-document token after each document included."""
    bytes: int
    """UTF-8 bytes of text."""
    sha256: str
    """Of the ``.bin`` file."""


def write_indexed(
    prefix: str | Path, documents: Iterable[str], tokenizer: Tokenizer, *, key: str
) -> Piece:
    """Write ``prefix.bin``, ``prefix.idx`` and last ``prefix.json``, which says they are whole.

    Ids are uint16 for vocabularies that fit, else int32, as Megatron's own preprocessing has them.
    Texts without a token are left out. The files appear under their names when they are whole.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    json_path = _beside(prefix, "json")
    json_path.unlink(missing_ok=True)  # from here on the old pair is not whole any more
    temporary = {kind: unfinished(_beside(prefix, kind)) for kind in ("bin", "idx")}
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    digest = hashlib.sha256()
    count = tokens = size = 0
    try:
        builder = IndexedDatasetBuilder(str(temporary["bin"]), dtype=dtype)
        for texts in _batches(documents):
            for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
                if not len(ids):
                    continue
                row = np.append(ids, tokenizer.eos_id).astype(dtype)
                builder.add_document(row, [len(row)])
                digest.update(row.tobytes())
                count, tokens, size = count + 1, tokens + len(row), size + len(text.encode())
        builder.finalize(str(temporary["idx"]))
        for kind, path in temporary.items():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(path, _beside(prefix, kind))
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    piece = Piece(key=key, documents=count, tokens=tokens, bytes=size, sha256=digest.hexdigest())
    write_json(json_path, asdict(piece))
    return piece


def read_piece(prefix: str | Path, key: str | None = None) -> Piece | None:
    """The finished pair at ``prefix``; ``None`` if it isn't finished or was made from other things
    (``key``)."""
    prefix = Path(prefix)
    try:
        piece = Piece(**json.loads(_beside(prefix, "json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    files = _beside(prefix, "bin").is_file() and _beside(prefix, "idx").is_file()
    return piece if files and (key is None or piece.key == key) else None


def _beside(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{suffix}")


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
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
