"""Byte streams from files that may be compressed, which their first bytes tell."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_btx.data.formats.part import need_pyarrow
from megatron_btx.errors import UserError


class _Streams(io.RawIOBase):
    """Concatenated compressed streams. ``BZ2File`` and ``LZMAFile`` ignore anything after a stream
    that is not another stream, so that a damaged one would hide all that follow it.

    Args:
        file: the file.
        make: a new decompressor.
    """

    def __init__(self, file: Path, make: Callable[[], Any]) -> None:
        self._file, self._make = file.open("rb"), make
        self._now = make()
        self._begun = False

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes, at most as many as ``buffer`` holds."""
        while True:
            data = b""
            if self._now.eof:
                data, self._now, self._begun = self._now.unused_data, self._make(), False
            if not data and self._now.needs_input:
                data = self._file.read(_BLOCK)
                if not data and self._begun:
                    raise EOFError("it ends within its data")
                if not data:
                    return 0
            if not self._begun:
                data = data.lstrip(b"\0")  # xz files may be padded with zeros
            self._begun = self._begun or bool(data)
            if found := self._now.decompress(data, len(buffer)):
                buffer[: len(found)] = found
                return len(found)

    def close(self) -> None:
        """Close the file too."""
        self._file.close()
        super().close()


def _streams(make: Callable[[], Any]) -> Callable[[Path], Any]:
    return lambda file: io.BufferedReader(_Streams(file, make))


def _zstd(file: Path) -> Any:
    need_pyarrow(file)
    import pyarrow

    return pyarrow.input_stream(str(file), compression="zstd")


_BLOCK = 1 << 16
_ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes((low, 0x2A, 0x4D, 0x18)) for low in range(0x50, 0x60)))
"""Of a frame, and of the sixteen kinds of frames that are skipped (RFC 8878)."""


@dataclass(frozen=True, slots=True)
class Compression:
    """One way to compress a file."""

    name: str
    suffixes: tuple[str, ...]
    marks: tuple[bytes, ...]
    """First bytes, one of them."""
    open: Callable[[Path], Any]


COMPRESSIONS = (
    Compression("gzip", (".gz",), (b"\x1f\x8b",), gzip.GzipFile),
    Compression("Zstandard", (".zst", ".zstd"), _ZSTD, _zstd),
    Compression("bzip2", (".bz2",), (b"BZh",), _streams(bz2.BZ2Decompressor)),
    Compression("xz", (".xz",), (b"\xfd7zXZ\x00",), _streams(lzma.LZMADecompressor)),
)

_DAMAGED = (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)


def compression_of(file: Path) -> Compression | None:
    """How ``file`` is compressed; ``None``: not at all, or in an unknown way."""
    with file.open("rb") as stream:
        head = stream.read(8)
    return next((c for c in COMPRESSIONS if head.startswith(c.marks)), None)


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """The bytes in ``file``, uncompressed.

    Raises:
        UserError: also from within the block: the compressed data are damaged or truncated.
    """
    kind = compression_of(file)
    if kind is None:
        with file.open("rb") as plain:
            yield plain
        return
    try:
        with kind.open(file) as stream:
            yield stream
    except UserError:
        raise
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the file's
        raise UserError(
            str(file), f"is not a whole {kind.name} file ({error})", "compress it again"
        ) from error
