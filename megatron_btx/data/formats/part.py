"""Shared by the formats: parts of files, documents and their limits, and reading a text column of
record batches (Parquet and Arrow)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError

Document = tuple[int, str]
"""Its place in its part, as for ``where``, and its text."""

MAX_DOCUMENT = 32 << 20
"""The most bytes of UTF-8 in a document. Tokenizing it takes several times as much memory."""
MAX_RECORD = 4 * MAX_DOCUMENT
"""The most bytes of JSON of a document: a character may take six (``\\u0007``)."""


@dataclass(frozen=True, slots=True)
class Part:
    """A range of a file."""

    file: Path
    begin: int = 0
    end: int | None = None
    """The range ``begin`` to ``end`` in the unit of the format: bytes of (uncompressed) JSON lines,
    row groups of Parquet, documents of a Megatron pair. ``None``: to the end of the file."""


TEXT_KEY = "the domain's text_key"
"""What errors call the key of the text: a recipe's. On the command line it is a flag."""


def checked(text: object, text_key: str) -> str:
    """Check a document's text and return it.

    Raises:
        UserError: it is not text, cannot be encoded as UTF-8, or is too long; the caller adds
        where.
    """
    if not isinstance(text, str):
        raise UserError(
            "",
            f"has no text under {text_key!r} (its type is {type(text).__name__})",
            f"set {TEXT_KEY} to the key that holds the text",
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
    """Check that pyarrow can be imported, for ``file``.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError(
            str(file), "needs pyarrow to be read", "pip install 'megatron-btx[data]'"
        ) from error


@contextmanager
def damaged(file: Path, kind: str) -> Iterator[Any]:
    """A context for reading ``file`` with pyarrow, the module that it yields.

    Raises:
        UserError: pyarrow is not installed, or cannot read the file.
    """
    need_pyarrow(file)
    import pyarrow

    try:
        yield pyarrow
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the file's
        first = str(error).partition("\n")[0]
        raise UserError(
            str(file), f"is not a whole {kind} file ({first})", "write or copy it again"
        ) from error


def check_column(file: Path, schema: Any, text_key: str) -> None:
    """Check that ``text_key`` is a column of text.

    Raises:
        UserError: there is no such column, or it has another type.
    """
    import pyarrow

    index = schema.get_field_index(text_key)
    kind = schema.field(index).type if index >= 0 else None
    wanted = {pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(),
              pyarrow.binary(), pyarrow.large_binary()}  # fmt: skip
    inner = kind.value_type if kind is not None and pyarrow.types.is_dictionary(kind) else kind
    if inner not in wanted:
        has = "there is no such column" if kind is None else f"it is {kind}"
        raise UserError(
            str(file),
            f"has no text under {text_key!r} ({has}; its columns: {', '.join(schema.names[:20])})",
            f"set {TEXT_KEY} to the column that holds the text",
        )


def documents(
    batches: Iterable[Any], part: Part, text_key: str, where: Callable[[Part, int], str]
) -> Iterator[Document]:
    """The text in the column ``text_key`` of record batches, with its row in ``part``.

    Raises:
        UserError: a row is empty, not UTF-8, or over the limit.
    """
    place = 0
    for batch in batches:
        for value in batch.column(text_key):
            try:
                yield place, checked(_text(value), text_key)
            except UserError as error:
                raise UserError(where(part, place), error.what, error.fix) from error.__cause__
            place += 1


def _text(value: Any) -> Any:
    try:
        text = value.as_py()
        return text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise UserError("", f"is not UTF-8 (byte {error.start + 1})", "convert it") from error


def is_prefix(path: Path) -> bool:
    """Whether ``path`` is the prefix of a pair, or one of its two files."""
    prefix = _prefix(path)
    return all(prefix.with_name(prefix.name + end).is_file() for end in (".bin", ".idx"))


def index_file(path: Path) -> Path:
    """The ``.idx`` of the pair at ``path``."""
    prefix = _prefix(path)
    return prefix.with_name(prefix.name + ".idx")


def pair_files(path: Path) -> list[Path]:
    """Both files of the pair at ``path``; none if there is no pair."""
    index = index_file(path)
    return [index.with_name(index.name[:-4] + end) for end in (".bin", ".idx")] * is_prefix(path)


def _prefix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path
