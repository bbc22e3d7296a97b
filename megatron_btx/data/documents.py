"""Users' text: JSONL files, plain or gzipped, and directories of them, read as a stream.

Every fault is a :class:`UserError` that names the file and the line, because a corpus of a
thousand shards is mended one line at a time.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_btx.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz")


def find_files(paths: Sequence[str | Path], *, where: str) -> list[Path]:
    """The JSONL files that ``paths`` (files and directories) stand for.

    A directory is searched through, its files in the order of their names; the order of ``paths``
    is kept. ``where`` is the recipe's key, for messages.

    Raises:
        UserError: a path is missing, a directory holds no JSONL file, or a file is empty.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.name.endswith(SUFFIXES) and f.is_file())
            if not found:
                raise UserError(
                    where,
                    f"the directory {path} holds no {' or '.join(SUFFIXES)} file",
                    "name a directory with JSONL files, or the files themselves",
                )
            files.extend(found)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(where, f"{path} does not exist", "correct the path")
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(where, f"{file} is empty", "remove it, or write documents to it")
    return files


def read_documents(files: Sequence[Path], text_key: str = "text") -> Iterator[str]:
    """The documents of JSONL ``files``, one after the other; blank lines are passed over.

    Raises:
        UserError: naming file and line, for text that is not UTF-8, a line that is not a JSON
            object, an object without a string under ``text_key``, a broken gzip file, or a file
            without a single document.
    """
    for file in files:
        count = 0
        for number, line in enumerate(_lines(file), 1):
            if not line.strip():
                continue
            yield _document(line, f"{file}:{number}", text_key)
            count += 1
        if not count:
            raise UserError(str(file), "holds no document", "remove it, or write documents to it")


def _lines(file: Path) -> Iterator[bytes]:
    with gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb") as lines:
        try:
            yield from lines
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise UserError(
                str(file), f"is not a whole gzip file ({error})", "compress it again"
            ) from error


def _document(line: bytes, where: str, text_key: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            where,
            f"is not UTF-8 (byte {error.start + 1} of the line)",
            "convert it, for example with iconv -t UTF-8",
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            where,
            f"is not a JSON object ({error})",
            f'write one object a line: {{"{text_key}": "..."}}',
        ) from error
    if not isinstance(record, dict):
        raise UserError(
            where,
            f"is a JSON {type(record).__name__}, not an object",
            f'write one object a line: {{"{text_key}": "..."}}',
        )
    text = record.get(text_key)
    if not isinstance(text, str):
        has = f"{text_key!r} is a {type(text).__name__}" if text_key in record else "it is missing"
        raise UserError(
            where,
            f"has no text under {text_key!r} ({has}; its keys: {', '.join(record) or 'none'})",
            "set the domain's text_key to the key that holds the text",
        )
    # json accepts "\ud800", half a character that no encoding of text can hold.
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                where,
                f"holds half of a surrogate pair at character {error.start + 1}",
                "write the character whole, or leave it out",
            ) from error
    return text
