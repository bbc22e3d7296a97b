"""What Parquet and Arrow files have in common: text in one column, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_btx.data.formats.part import Document, Part, checked, need_pyarrow
from megatron_btx.errors import UserError


@contextmanager
def damaged(file: Path, kind: str) -> Iterator[Any]:
    """A block that reads ``file`` with pyarrow, which it is given.

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
    """That there is a column of text.

    Raises:
        UserError: there is none under that name.
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
            "set the domain's text_key to the column that holds the text",
        )


def documents(
    batches: Iterable[Any], part: Part, text_key: str, where: Callable[[Part, int], str]
) -> Iterator[Document]:
    """The text in the column ``text_key`` of record batches; its place is its row in ``part``.

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
