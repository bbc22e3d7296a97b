"""Streams of bytes out of files that may be compressed, told by their first bytes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_btx.data.formats.part import need_pyarrow
from megatron_btx.errors import UserError


def _zstd(file: Path) -> Any:
    need_pyarrow(file)
    import pyarrow

    return pyarrow.input_stream(str(file), compression="zstd")


@dataclass(frozen=True, slots=True)
class Compression:
    """One way to compress a file."""

    name: str
    suffixes: tuple[str, ...]
    mark: bytes
    """First bytes."""
    open: Callable[[Path], Any]


COMPRESSIONS = (
    Compression("gzip", (".gz",), b"\x1f\x8b", gzip.GzipFile),
    Compression("Zstandard", (".zst", ".zstd"), b"\x28\xb5\x2f\xfd", _zstd),
    Compression("bzip2", (".bz2",), b"BZh", bz2.BZ2File),
    Compression("xz", (".xz",), b"\xfd7zXZ\x00", lzma.LZMAFile),
)

_DAMAGED = (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)


def compression_of(file: Path) -> Compression | None:
    """How ``file`` is compressed; ``None``: not, or in a way that we do not know."""
    with file.open("rb") as stream:
        head = stream.read(8)
    return next((c for c in COMPRESSIONS if head.startswith(c.mark)), None)


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """The bytes in ``file``, uncompressed.

    Raises:
        UserError: in the block too: the compressed data are damaged or cut off.
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
