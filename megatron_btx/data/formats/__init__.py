"""Formats of users' text: detecting a file's format, and reading its documents.

A format is a module with three functions: ``split(file, size)`` divides a file into
:class:`Part` s of about ``size`` bytes that can be read independently, ``read(part, text_key)``
yields the documents of one, and ``where(part, place)`` names a document. They import no torch, and
``pyarrow`` only if a file needs it.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from megatron_btx.data.formats.part import Part
from megatron_btx.errors import UserError

__all__ = ["Part", "format_of"]


def format_of(file: Path) -> ModuleType:
    """The format of a file, by its first bytes; without a known signature it is JSON.

    Raises:
        UserError: the file cannot be read.
    """
    from megatron_btx.data.formats import arrow, json_lines, parquet, token_pair

    marks = {b"PAR1": parquet, b"ARROW1": arrow, b"\xff\xff\xff\xff": arrow,
             b"MMIDIDX\x00\x00": token_pair}  # fmt: skip
    try:
        with file.open("rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise UserError(
            str(file), f"cannot be read ({error.strerror})", "make it readable"
        ) from error
    return next((form for mark, form in marks.items() if head.startswith(mark)), json_lines)
