"""A stretch of a file of text, a document of it, and what both may be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_btx.errors import UserError

Document = tuple[int, str]
"""Its place in its part, as ``where`` takes it, and its text."""

MAX_DOCUMENT = 32 << 20
"""Bytes of UTF-8 in one document at most. Tokenizing one takes several times as much memory."""
MAX_RECORD = 4 * MAX_DOCUMENT
"""Bytes of the JSON around a document at most: a character may be written in six (``\\u0007``)."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a file."""

    file: Path
    begin: int = 0
    end: int | None = None
    """From here to there in the format's own unit: bytes of (uncompressed) JSON lines, row groups
    of Parquet, documents of a Megatron pair. ``None``: to the end of the file."""


def checked(text: object, text_key: str) -> str:
    """A document's text.

    Raises:
        UserError: it is no text that UTF-8 can hold, or too long; whoever reads says where.
    """
    if not isinstance(text, str):
        raise UserError(
            "",
            f"has no text under {text_key!r} (it is a {type(text).__name__})",
            "set the domain's text_key to the key that holds the text",
        )
    size = len(text)
    if not text.isascii():
        # json accepts "\ud800", half a character that no encoding of text can hold.
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise UserError(
                "",
                f"holds half of a surrogate pair at character {error.start + 1}",
                "write the character whole, or leave it out",
            ) from error
    if size > MAX_DOCUMENT:
        raise too_long("", f"{size:,} bytes of text", MAX_DOCUMENT)
    return text


def too_long(where: str, size: str, limit: int) -> UserError:
    """The error for a document over the limit."""
    return UserError(
        where,
        f"is a document of {size}; {limit:,} are the most",
        "cut it into several documents, or leave it out",
    )


def need_pyarrow(file: Path) -> None:
    """Before pyarrow is imported for ``file``.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError(
            str(file), "needs pyarrow to be read", "pip install 'megatron-btx[data]'"
        ) from error
