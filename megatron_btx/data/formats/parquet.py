"""Parquet: one column, one row group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_btx.data.formats.part import Document, Part, check_column, damaged, documents

_ROWS = 256
"""Rows that are read at a time."""


def split(file: Path, size: int) -> list[Part]:
    """Consecutive row groups of about ``size`` bytes."""
    parts: list[Part] = []
    with _opened(file) as table:
        begin = held = 0
        for group in range(table.num_row_groups):
            held += table.metadata.row_group(group).total_byte_size
            if held >= size:
                parts.append(Part(file, begin, group + 1))
                begin, held = group + 1, 0
        if begin < table.num_row_groups or not parts:
            parts.append(Part(file, begin, table.num_row_groups))
    return parts


def read(part: Part, text_key: str) -> Iterator[Document]:
    """The documents of the row groups of ``part``.

    Raises:
        UserError: the file is damaged, has no such column of text, or a row holds none.
    """
    with _opened(part.file) as table:
        check_column(part.file, table.schema_arrow, text_key)
        end = table.num_row_groups if part.end is None else min(part.end, table.num_row_groups)
        groups = list(range(part.begin, end))
        batches = table.iter_batches(batch_size=_ROWS, row_groups=groups, columns=[text_key])
        yield from documents(batches, part, text_key, where)


def where(part: Part, place: int) -> str:
    """``file, row n`` (from 1) of the ``place``-th row (from 0) of ``part``."""
    return f"{part.file}, row {_rows_before(part) + place + 1}"


@lru_cache(maxsize=8)
def _rows_before(part: Part) -> int:
    with _opened(part.file) as table:
        return sum(table.metadata.row_group(group).num_rows for group in range(part.begin))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    with damaged(file, "Parquet"):
        from pyarrow import parquet

        with parquet.ParquetFile(file, page_checksum_verification=True) as table:
            yield table
