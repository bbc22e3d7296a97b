"""Arrow files and streams, the format of Hugging Face's ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_btx.data.formats.part import Document, Part, check_column, damaged, documents
from megatron_btx.errors import UserError

_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""The end marker of a stream (Arrow columnar format, "IPC Streaming Format")."""


def split(file: Path, size: int) -> list[Part]:
    """The whole file: ``datasets`` writes files of 500 MB."""
    return [Part(file)]


def read(part: Part, text_key: str) -> Iterator[Document]:
    """The documents of the file.

    Raises:
        UserError: the file is damaged, has no such column of text, or a row holds none.
    """
    with damaged(part.file, "Arrow") as pyarrow:
        with part.file.open("rb") as stream:
            is_file = stream.read(6) == b"ARROW1"
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - len(_END)))
            is_whole = is_file or stream.read() == _END
        if not is_whole:
            raise UserError(
                str(part.file),
                "is a truncated Arrow stream (it has no end)",
                "write or copy it again",
            )
        with pyarrow.memory_map(str(part.file)) as source:
            if is_file:
                table = pyarrow.ipc.open_file(source)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
            else:
                table = batches = pyarrow.ipc.open_stream(source)
            check_column(part.file, table.schema, text_key)
            yield from documents(batches, part, text_key, where)


def where(part: Part, place: int) -> str:
    """``file, row n`` (from 1) of the ``place``-th row (from 0)."""
    return f"{part.file}, row {place + 1}"
