"""JSON, plain or compressed: an object per line, or one list of objects.

It is read block by block, so that neither a long line nor gigabytes of blank lines take memory.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from megatron_btx.data.formats.compression import compression_of, opened
from megatron_btx.data.formats.part import MAX_RECORD, TEXT_KEY, Document, Part, checked, too_long
from megatron_btx.errors import UserError

_BLOCK = 1 << 20
_SPACE = re.compile(r"\s*")


def split(file: Path, size: int) -> list[Part]:
    """Plain lines are divided by bytes; a compressed file or a list is one part."""
    total = file.stat().st_size
    if total <= size or compression_of(file) is not None or _is_list(file):
        return [Part(file)]
    return [Part(file, begin, min(begin + size, total)) for begin in range(0, total, size)]


def read(part: Part, text_key: str) -> Iterator[Document]:
    """The documents of the lines that begin in ``part``; blank lines are skipped.

    Raises:
        UserError: naming file and line, for text that is not UTF-8, a line that is not a JSON
            object, an object without a string under ``text_key``, a document over the limit, or a
            damaged compressed file.
    """
    records = _values if _is_list(part.file) else _lines
    for number, record in records(part):
        try:
            if isinstance(record, tuple):
                written, record = record  # noqa: PLW2901
                _check_once(written, text_key)
            text = _text(record, text_key)
        except UserError as error:
            raise UserError(where(part, number), error.what, error.fix) from error.__cause__
        yield number, text


def where(part: Part, place: int) -> str:
    """``file:line`` of line number ``place`` of ``part``."""
    return f"{part.file}:{_lines_before(part) + place}"


@lru_cache(maxsize=8)
def _lines_before(part: Part) -> int:
    before, left = 0, part.begin - 1
    if left > 0:
        with opened(part.file) as stream:
            while left and (block := stream.read(min(left, _BLOCK))):
                before += block.count(b"\n")
                left -= len(block)
    return before


def _text(record: Any, text_key: str) -> str:
    try:
        if isinstance(record, bytes):
            text = record.decode("utf-8-sig")
            record = json.loads(text)
            _check_once(text, text_key)
    except UnicodeDecodeError as error:
        raise UserError(
            "",
            f"is not UTF-8 (byte {error.start + 1} of the line)",
            "if it is text at all, convert it, for example with iconv -t UTF-8",
        ) from error
    except (ValueError, RecursionError) as error:
        raise _not_an_object(f"not a JSON object ({error})", text_key) from error
    if not isinstance(record, dict):
        raise _not_an_object(f"a JSON {type(record).__name__}, not an object", text_key)
    if text_key not in record:
        raise UserError(
            "",
            f"has no text under {text_key!r} (it is missing; its keys: "
            f"{', '.join(map(str, list(record)[:20])) or 'none'})",
            f"set {TEXT_KEY} to the key that holds the text",
        )
    return checked(record[text_key], text_key)


def _check_once(text: str, text_key: str) -> None:
    """Check that a JSON object has ``text_key`` only once: of duplicates the parser keeps one.

    Raises:
        UserError: it has several.
    """
    if text.count(json.dumps(text_key)) < 2:
        return
    times = 0

    def count(pairs: list[tuple[str, Any]]) -> None:
        nonlocal times
        times = sum(key == text_key for key, _ in pairs)  # at last of the outermost

    json.loads(text, object_pairs_hook=count)
    if times > 1:
        what = f"has {times} texts under {text_key!r}"
        raise UserError("", what, "keep one, or give them different keys")


def _not_an_object(what: str, text_key: str) -> UserError:
    return UserError("", f"is {what}", f'write one object a line: {{"{text_key}": "..."}}')


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in ``part`` and are not blank, each with its number: 1 is the line in
    which the byte before the part lies, or the file's first."""
    with opened(part.file) as stream:
        begin, ours = part.begin, part.begin == 0
        if not ours:  # what stands before the first line break is the rest of another part's line
            begin -= 1
            stream.seek(begin)
        number, size = 1, 0
        held: list[bytes] = []
        while (part.end is None or begin < part.end) and (block := stream.read(_BLOCK)):
            if ours and not size and block.isspace():  # gigabytes of blank lines, block by block
                number += block.count(b"\n")
                held = [block[block.rfind(b"\n") + 1 :]]
                size = len(held[0])
                begin += len(block) - size
                continue
            *whole, rest = block.split(b"\n")
            for line in whole:
                if size:
                    line = b"".join([*held, line])  # noqa: PLW2901
                    held, size = [], 0
                if ours and part.end is not None and begin >= part.end:
                    return
                if ours and not _is_blank(line):
                    yield number, line
                number, begin, ours = number + 1, begin + len(line) + 1, True
            held.append(rest)
            size += len(rest)
            if size > MAX_RECORD:
                raise too_long(where(part, number), f"over {size:,} bytes of JSON", MAX_RECORD)
        last = b"".join(held)
        if ours and not _is_blank(last) and (part.end is None or begin < part.end):
            yield number, last


def _is_blank(line: bytes) -> bool:
    """Whether a line is empty but for white space and byte-order marks (of concatenated files)."""
    return not line or line.isspace() or not line.removeprefix(codecs.BOM_UTF8).strip()


def _is_list(file: Path) -> bool:
    """Whether it is one list of objects, or objects written over several lines."""
    with opened(file) as stream:
        head = stream.read(_BLOCK).removeprefix(codecs.BOM_UTF8).lstrip()
    return head.startswith(b"[") or head.partition(b"\n")[0].strip() == b"{"


def _values(part: Part) -> Iterator[tuple[int, Any]]:
    """The values of a list, or consecutive values, each with the line in which it begins."""
    with opened(part.file) as stream:
        source = _Source(stream, part)
        in_list = source.peek() == "["
        if in_list:
            source.take()
        closed = in_list and source.peek() == "]"
        while not closed and source.peek():
            yield source.value()
            following = source.peek()
            if in_list and following not in (",", "]"):
                raise source.error("what follows is neither ',' nor ']'")
            closed = following == "]"
            if in_list and not closed:
                source.take()
        if closed:
            source.take()
        if in_list and (not closed or source.peek()):
            raise source.error("the list is cut off" if not closed else "something follows it")


class _Source:
    """JSON text that is read incrementally."""

    def __init__(self, stream: IO[bytes], part: Part) -> None:
        self._stream, self._part = stream, part
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._skip(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(_BLOCK):
                return ""

    def take(self) -> None:
        """Consume the character that ``peek`` returned."""
        self._skip(self._at + 1)

    def value(self) -> tuple[int, tuple[str, Any]]:
        """The next value: its line, and its text and parsed form."""
        while True:
            try:
                found, end = self._scan(self._text, self._at)
            except RecursionError as error:
                raise self.error(str(error)) from error
            except ValueError as error:
                if not self._more(max(_BLOCK, len(self._text))):
                    raise self.error(str(error)) from error
            else:
                line, written = self._line, self._text[self._at : end]
                self._skip(end)
                return line, (written, found)

    def error(self, what: str) -> UserError:
        """The error for malformed JSON at the current position."""
        return UserError(
            where(self._part, self._line), f"is not a list of JSON objects ({what})", "mend it"
        )

    def _skip(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _more(self, size: int) -> bool:
        if self._ended:
            return False
        block = self._stream.read(size)
        self._ended = not block
        try:
            self._text = self._text[self._at :] + self._decode(block, self._ended)
        except UnicodeDecodeError as error:
            raise self.error("it is not UTF-8") from error
        self._at = 0
        if len(self._text) > MAX_RECORD:
            line = where(self._part, self._line)
            raise too_long(line, f"over {MAX_RECORD:,} characters of JSON", MAX_RECORD)
        return True
