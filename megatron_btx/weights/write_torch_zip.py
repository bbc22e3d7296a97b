"""The archive that ``torch.save`` makes of one tensor, written around bytes that are streamed.

An uncompressed zip of ``data.pkl`` (shape, dtype, strides), ``byteorder``, ``data/0`` (the bytes)
and ``version``. Its length follows from shape and dtype alone, so the place of every archive in a
file is known before any is written.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Iterable
from math import prod
from typing import Any, BinaryIO
from zlib import crc32

import torch

from megatron_btx.weights.box import Shape
from megatron_btx.weights.safe_unpickle import STORAGES

ALIGN = 64
"""Archives begin, and payloads lie, at multiples of this."""
LIMIT = 1 << 32
"""Bytes of payload must stay below what a zip without extensions can say."""

_DATE = 0x21  # 1 January 1980: the same bytes whenever it is written


class Archive:
    """One tensor's archive.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.payload = prod(shape) * dtype.itemsize
        if self.payload >= LIMIT:
            raise ValueError(f"{self.payload} bytes in one archive")
        header = _header(shape, dtype)
        small = [("data.pkl", header), ("byteorder", b"little")]
        self._entries = [(name, len(content), crc32(content)) for name, content in small]
        self._starts: list[int] = []
        self._head = b""
        for name, content in small:
            self._starts.append(len(self._head))
            self._head += _local(name, len(content), crc32(content)) + content
        self._starts.append(len(self._head))
        bare = len(self._head) + len(_local("data/0", 0, 0))
        self._padding = -bare % ALIGN
        self._head += self._before(0)

    @property
    def nbytes(self) -> int:
        """Length of the whole archive."""
        return len(self._head) + self.payload + len(self._tail(0))

    def write(self, file: BinaryIO, chunks: Iterable[memoryview]) -> None:
        """Write the archive at the file's position, its payload from consecutive ``chunks``. The
        header before the payload holds the checksum: where there are several chunks, it is
        written again."""
        begin = file.tell()
        parts = iter(chunks)
        first = next(parts, memoryview(b""))
        checksum = crc32(first)
        file.write(self._head[: self._starts[-1]] + self._before(checksum))
        written = file.write(first)
        for chunk in parts:
            checksum = crc32(chunk, checksum)
            written += file.write(chunk)
        assert written == self.payload
        file.write(self._tail(checksum))
        if len(first) < self.payload:
            end = file.tell()
            file.seek(begin + self._starts[-1])
            file.write(self._before(checksum))
            file.seek(end)

    def _before(self, checksum: int) -> bytes:
        return _local("data/0", self.payload, checksum, self._padding)

    def _tail(self, checksum: int) -> bytes:
        version = _local("version", 2, crc32(b"3\n")) + b"3\n"
        starts = [*self._starts, len(self._head) + self.payload]
        entries = [
            *self._entries,
            ("data/0", self.payload, checksum),
            ("version", 2, crc32(b"3\n")),
        ]
        directory = b"".join(
            _central(*entry, start) for entry, start in zip(entries, starts, strict=True)
        )
        at = starts[-1] + len(version)
        count = len(entries)
        end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(directory), at, 0)
        return version + directory + end


def _local(name: str, size: int, checksum: int, padding: int = 0) -> bytes:
    """A local file header; torch's own archives pad with the same extra field."""
    full = f"archive/{name}".encode()
    # An extra field has four bytes of its own; an alignment that leaves less room takes one more.
    extra = padding if padding in (0, *range(4, ALIGN)) else padding + ALIGN
    fields = (b"PK\3\4", 20, 0, 0, 0, _DATE, checksum, size, size, len(full), extra)
    body = struct.pack("<2sH", b"FB", extra - 4) + b"Z" * (extra - 4) if extra else b""
    return struct.pack("<4s5H3I2H", *fields) + full + body


def _central(name: str, size: int, checksum: int, start: int) -> bytes:
    full = f"archive/{name}".encode()
    fields = (b"PK\1\2", 20, 20, 0, 0, 0, _DATE, checksum, size, size, len(full))
    return struct.pack("<4s6H3I5H2I", *fields, 0, 0, 0, 0, 0, start) + full


class _Storage:
    """Stands for the storage in the pickle: torch.load finds it by its persistent id."""

    def __init__(self, dtype: torch.dtype, numel: int) -> None:
        (kind,) = (name for name, held in STORAGES.items() if held == dtype)
        self.persistent_id = ("storage", getattr(torch, kind), "0", "cpu", numel)


class _Tensor:
    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        storage = _Storage(dtype, prod(shape))
        self._arguments: tuple[Any, ...] = (storage, 0, shape, strides, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self._arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.persistent_id if isinstance(obj, _Storage) else None


def _header(shape: Shape, dtype: torch.dtype) -> bytes:
    """``data.pkl``: what torch.save writes for a contiguous tensor."""
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump(_Tensor(shape, dtype))
    return out.getvalue()
