"""Megatron's ``.bin`` / ``.idx`` pairs: documents as token ids.

The index is a header (``MMIDIDX``, version, number format, counts), then the length of every
sequence (int32), its byte in the ``.bin`` (int64), and the first sequence of every document
(``_IndexWriter`` in megatron/core/datasets/indexed_dataset.py). They are read here without
torch, and checked, because Megatron trusts an index.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_btx.data.formats.part import Document, Part
from megatron_btx.errors import UserError

_MARK = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Megatron's codes of number formats (``DType``); 6 and 7 are floats."""
_BLOCK = 1 << 24
"""Ids that are checked at a time."""


def split(file: Path, size: int) -> list[Part]:
    """Consecutive documents with about ``size`` bytes of ids."""
    pair = TokenPair(file)
    ends = np.cumsum(pair.lengths, dtype=np.int64) * pair.dtype.itemsize
    parts, begin = [], 0
    while begin < len(ends):
        before = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + size, "right")))
        parts.append(Part(file, begin, end))
        begin = end
    return parts


def read(part: Part, text_key: str) -> Iterator[Document]:
    """Part of a format's interface; a pair has no text.

    Raises:
        UserError: always.
    """
    raise UserError(
        str(part.file), "holds token ids, not text", "give text here, or decode it first"
    )


def where(part: Part, place: int) -> str:
    """``file, document n`` (from 1) of the ``place``-th document (from 0) of ``part``."""
    return f"{part.file}, document {part.begin + place + 1}"


class TokenPair:
    """A pair whose index matches its ``.bin``: documents follow each other without gaps.

    Args:
        file: its ``.idx``.

    Raises:
        UserError: the two files do not match, or a document has several sequences.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.bin = file, file.with_suffix(".bin")
        if not self.bin.is_file():
            raise UserError(str(file), f"{self.bin.name} is not beside it", "give both files")
        sequences, documents, self.dtype = self._header()
        size = file.stat().st_size - _HEADER.size
        needed = sequences * 12 + documents * 8
        if size != needed:
            what = "is for pictures and text" if size == needed + sequences else "is cut off"
            raise UserError(
                str(file), f"{what} ({size:,} bytes behind its header, {needed:,} are needed)",
                "make the pair again",
            )  # fmt: skip
        kinds: tuple[tuple[type, int], ...] = (
            (np.int32, sequences), (np.int64, sequences), (np.int64, documents)
        )  # fmt: skip
        offset, arrays = _HEADER.size, []
        for kind, count in kinds:
            array = np.memmap(file, kind, "r", offset, (count,)) if count else np.empty(0, kind)
            arrays.append(array)
            offset += array.nbytes
        self.lengths, pointers, indices = arrays
        """Number of ids of each document, int32 [documents]."""
        self._check(pointers, indices)

    def _header(self) -> tuple[int, int, np.dtype]:
        with self.file.open("rb") as stream:
            head = stream.read(_HEADER.size)
        try:
            mark, version, code, sequences, documents = _HEADER.unpack(head)
            if mark != _MARK or version != 1:
                raise ValueError("unknown version")
        except (struct.error, ValueError) as error:
            raise UserError(
                str(self.file), f"is not a Megatron index ({error})", "make the pair again"
            ) from error
        if code not in _DTYPES:
            raise UserError(
                str(self.file), f"does not hold token ids (number format {code})", "give text ids"
            )
        return sequences, documents, np.dtype(_DTYPES[code])

    def _check(self, pointers: np.ndarray, indices: np.ndarray) -> None:
        if not len(self.lengths):
            raise UserError(str(self.file), "holds no document", "remove it")
        if len(indices) != len(self.lengths) + 1 or np.any(np.diff(indices) != 1) or indices[0]:
            raise UserError(
                str(self.file),
                "has documents of several sequences, as for BERT",
                "make it with tools/preprocess_data.py without --split-sentences",
            )
        if np.any(self.lengths <= 0):
            raise self._wrong(int(np.argmax(self.lengths <= 0)), "has no ids")
        ends = np.cumsum(self.lengths, dtype=np.int64) * self.dtype.itemsize
        begins = ends - self.lengths * np.int64(self.dtype.itemsize)
        if np.any(pointers != begins):
            place = int(np.argmax(np.asarray(pointers != begins)))
            raise self._wrong(place, f"begins at byte {pointers[place]}, not {begins[place]}")
        size = self.bin.stat().st_size
        if size < ends[-1]:
            raise self._wrong(
                int(np.searchsorted(ends, size, "right")),
                f"ends behind the end of {self.bin.name}, which has {size:,} of {ends[-1]:,} bytes",
            )
        if size > ends[-1]:
            raise UserError(
                str(self.bin),
                f"has {size:,} bytes, of which {self.file.name} knows {ends[-1]:,}",
                "make the pair again",
            )

    def _wrong(self, document: int, what: str) -> UserError:
        return UserError(where(Part(self.file), document), what, "make the pair again")

    def documents(self, begin: int = 0, end: int | None = None) -> Iterator[np.ndarray]:
        """Token ids of documents ``begin`` up to ``end`` (exclusive), an array each, with its end
        token."""
        ids = np.memmap(self.bin, self.dtype, "r")
        at = int(self.lengths[:begin].sum(dtype=np.int64))
        for length in self.lengths[begin:end].tolist():
            yield ids[at : at + length]
            at += length

    def check_ids(
        self, eos_id: int, vocab_size: int, begin: int = 0, end: int | None = None
    ) -> int:
        """Check documents ``begin`` to ``end`` against a tokenizer: every id is in its vocabulary,
        and each document ends with its end token. Returns the number of ids.

        Raises:
            UserError: naming document and place.
        """
        if np.iinfo(self.dtype).max < vocab_size - 1:
            raise UserError(
                str(self.file),
                f"its {self.dtype} cannot hold the {vocab_size:,} ids of the tokenizer",
                "make the pair with the tokenizer that the recipe names",
            )
        lengths = self.lengths[begin:end].astype(np.int64)
        first = int(self.lengths[:begin].sum(dtype=np.int64))
        ends = np.cumsum(lengths)
        with self.bin.open("rb") as stream:
            stream.seek(first * self.dtype.itemsize)
            for at in range(0, int(ends[-1]), _BLOCK):
                ids = np.fromfile(stream, self.dtype, min(_BLOCK, int(ends[-1]) - at))
                if ids.size and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
                    bad = at + int(np.argmax((ids >= vocab_size) | (ids < 0)))
                    document = int(np.searchsorted(ends, bad, "right"))
                    place = bad - int(ends[document] - lengths[document])
                    raise UserError(
                        where(Part(self.file), begin + document),
                        f"has the id {ids[bad - at]} at place {place + 1}; the tokenizer's are 0 "
                        f"to {vocab_size - 1}",
                        "make the pair with the tokenizer that the recipe names",
                    )
                inside = ends[np.searchsorted(ends, at, "right") : np.searchsorted(
                    ends, at + len(ids), "right")]  # fmt: skip
                last = ids[inside - 1 - at]
                if np.any(last != eos_id):
                    document = int(np.searchsorted(ends, inside[np.argmax(last != eos_id)]))
                    raise UserError(
                        where(Part(self.file), begin + document),
                        f"ends with the id {last[np.argmax(last != eos_id)]}, not with the "
                        f"tokenizer's end token {eos_id}",
                        "make the pair with this tokenizer and --append-eod",
                    )
        return int(ends[-1])
