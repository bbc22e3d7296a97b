"""The archive that ``torch.save`` wrote of one tensor, inside a ``.distcp`` file: the place of the
elements in it, and their stored CRC-32. The elements themselves are not read.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from megatron_btx.errors import UserError, shown
from megatron_btx.weights import safe_unpickle
from megatron_btx.weights.box import Box, Shape, extent, sizes, told

_AGAIN = "copy the checkpoint again, or take an earlier step"
_SMALL = 1 << 20
"""Bytes of an archive's members beside the data, at most."""
DAMAGED = (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OverflowError)
MALFORMED = (LookupError, ValueError, AttributeError, TypeError, struct.error, RecursionError)
"""What zipfile, and what looking for something in a header, makes of a damaged archive."""


@dataclass(frozen=True)
class Chunk:
    """One stored block of a tensor: which elements, and the archive that holds them."""

    box: Box
    path: Path
    offset: int
    length: int


class _FileSection(io.RawIOBase):
    """Bytes ``offset .. offset + length`` of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        size = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._offset + self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data


@dataclass(frozen=True)
class Checksum:
    """CRC-32 of the bytes ``start .. start + size`` of a file, which hold (a part of) a tensor."""

    start: int
    size: int
    crc: int
    tensor: str


@dataclass(frozen=True)
class Payload:
    """Where the elements of a chunk lie: byte in the file of the first, strides in elements."""

    offset: int
    strides: Shape
    checksum: Checksum | None
    """Of the whole storage; ``None`` where torch was told to save without
    (``torch.serialization.set_crc32_options``), which leaves zeros."""


class StoredArchive:
    """The zip that ``torch.save`` makes, inside a file."""

    def __init__(self, file: BinaryIO, chunk: Chunk) -> None:
        self._file, self._chunk = file, chunk
        archive = zipfile.ZipFile(_FileSection(file, chunk.offset, chunk.length))
        self._members = {e.filename.partition("/")[2]: e for e in archive.infolist()}

    def member(self, name: str) -> tuple[int, int, int]:
        """Begin (in the file), size and CRC-32 of a member. A local file header is 30 bytes, a
        name, an extra field (torch pads with it), then the data."""
        entry = self._members[name]
        self._file.seek(self._chunk.offset + entry.header_offset)
        local = self._file.read(30)
        start = entry.header_offset + 30
        start += int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"{shown(name)} is compressed")
        if entry.header_offset < 0 or start + entry.file_size > self._chunk.length:
            raise ValueError(f"{shown(name)} reaches past the end")
        return self._chunk.offset + start, entry.file_size, entry.CRC

    def check_order(self, where: str) -> None:
        """That numbers in it are little-endian, as those of torch before 2.1 are, which does not
        say it.

        Raises:
            UserError: they are not.
        """
        if "byteorder" in self._members and self.read("byteorder") != b"little":
            raise UserError(where, "big-endian", "save it on a little-endian machine")

    @property
    def names(self) -> list[str]:
        """Of its members."""
        return list(self._members)

    def read(self, name: str, limit: int = _SMALL) -> bytes:
        """A member of at most ``limit`` bytes, checked."""
        start, size, crc = self.member(name)
        if size > limit:
            raise ValueError(f"{shown(name)} has {size} bytes")
        self._file.seek(start)
        data = self._file.read(size)
        if crc not in (0, zlib.crc32(data)):
            raise ValueError(f"{shown(name)} does not have the CRC-32 that is stored with it")
        return data


def payload_of(name: str, dtype: torch.dtype, chunk: Chunk) -> Payload:
    """Find the elements of a chunk.

    The archive is ``torch.save`` of one tensor: ``data.pkl`` names storage, offset, size and
    strides; ``data/<key>`` holds the storage.
    """
    where = f"{chunk.path}: {shown(name)}"
    try:
        with chunk.path.open("rb") as file:
            archive = StoredArchive(file, chunk)
            archive.check_order(where)
            header = archive.read("data.pkl")
            tensor = safe_unpickle.loads(header, where, safe_unpickle.TENSOR_NAMES)
            (_, stored_dtype, key, _, _), first, size, strides = tensor.arguments[:4]
            start, nbytes, crc = archive.member(f"data/{key}")
        first, size, strides = sizes((first,))[0], sizes(size), sizes(strides)
        last = first + sum((n - 1) * s for n, s in zip(size, strides, strict=True))
    except UserError:
        raise
    except (*DAMAGED, *MALFORMED) as error:
        raise UserError(where, f"corrupt: {error}", _AGAIN) from error
    own = [n for n in extent(chunk.box) if n != 1]
    sound = (
        stored_dtype == dtype
        and [n for n in size if n != 1] == own
        and (last + 1) * dtype.itemsize <= nbytes
    )
    if not sound:
        what = f"holds {told(stored_dtype)} {tuple(size)}: not what .metadata says"
        raise UserError(where, what, _AGAIN)
    # Axes of length one may be in the chunk's box and not in the tensor: any stride will do.
    left = iter(stride for n, stride in zip(size, strides, strict=True) if n != 1)
    expanded = tuple(0 if n == 1 else next(left) for n in extent(chunk.box))
    checksum = Checksum(start, nbytes, crc, name) if crc else None
    return Payload(start + first * dtype.itemsize, expanded, checksum)
