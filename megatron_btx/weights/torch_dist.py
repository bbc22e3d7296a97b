"""Megatron ``torch_dist`` directories, read by mapped slices.

A stored tensor is a global shape and a grid of chunks. Each chunk is one ``torch.save`` archive (an
uncompressed zip) somewhere inside a ``.distcp`` file, so the bytes of any slice of it lie at a
known place. The checkpoint library's own reader takes whole chunks and wants a process group;
this one takes the slice and wants nothing.
"""

from __future__ import annotations

import bisect
import io
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.weights import safe_unpickle
from megatron_btx.weights.box import Box, Shape, extent, intersection, shifted, slices
from megatron_btx.weights.mmap_io import read_box, stamp_of
from megatron_btx.weights.source import FileSource

_AGAIN = "copy the checkpoint again, or take an earlier step"


@dataclass(frozen=True)
class Chunk:
    """One stored block of a tensor: which elements, and the archive that holds them."""

    box: Box
    path: Path
    offset: int
    length: int


@dataclass
class _Stored:
    shape: Shape
    dtype: torch.dtype
    chunks: list[Chunk]
    by_row: dict[int, list[Chunk]] = field(default_factory=lambda: defaultdict(list))
    starts: list[int] = field(default_factory=list)
    tallest: int = 0

    def index(self) -> None:
        """Group the chunks by their first row, so that a read finds its own among thousands."""
        for chunk in self.chunks:
            start, stop = chunk.box[0] if chunk.box else (0, 1)
            self.by_row[start].append(chunk)
            self.tallest = max(self.tallest, stop - start)
        self.starts = sorted(self.by_row)

    def meeting(self, box: Box) -> Iterator[tuple[Chunk, Box]]:
        """The chunks that ``box`` touches and what it takes of each."""
        start, stop = box[0] if box else (0, 1)
        first = bisect.bisect_left(self.starts, start - self.tallest + 1)
        for at in self.starts[first : bisect.bisect_left(self.starts, stop)]:
            for chunk in self.by_row[at]:
                common = intersection(box, chunk.box)
                if common is not None:
                    yield chunk, common


class TorchDistSource(FileSource[_Stored]):
    """The tensors of a ``torch_dist`` directory under the names and shapes it stores.

    Args:
        path: the directory with ``.metadata``.

    Raises:
        UserError: no such checkpoint, a pickle that names anything unexpected.
        UserErrors: missing or truncated files and tensors whose chunks leave holes, all at once.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        self.path = Path(path)
        metadata = read_metadata(self.path)
        self.objects: list[str] = []
        """Names of stored things that are not tensors."""
        self._archives: dict[Chunk, tuple[int, Shape]] = {}
        try:
            self._fill(metadata)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                str(self.path / ".metadata"), f"not a checkpoint's metadata: {error}", _AGAIN
            ) from error
        errors = list(self._check())
        if errors:
            raise UserErrors(errors)

    @property
    def stamp(self) -> str:
        """Names, sizes and times of the files."""
        chunks = [chunk for stored in self._stored.values() for chunk in stored.chunks]
        return stamp_of({self.path / ".metadata", *(chunk.path for chunk in chunks)})

    def read(self, name: str, box: Box) -> Tensor:
        """The elements of ``box``: mapped where one chunk holds them, else gathered."""
        stored = self._counted(name, box)
        found = list(stored.meeting(box))
        if len(found) == 1:
            return self._read_chunk(name, stored.dtype, *found[0])
        out = torch.empty(extent(box), dtype=stored.dtype)
        for chunk, common in found:
            out[slices(common, box)] = self._read_chunk(name, stored.dtype, chunk, common)
        return out

    def _read_chunk(self, name: str, dtype: torch.dtype, chunk: Chunk, box: Box) -> Tensor:
        if chunk not in self._archives:
            self._archives[chunk] = _payload(name, dtype, chunk)
        offset, strides = self._archives[chunk]
        within = shifted(box, tuple(-start for start, _ in chunk.box))
        return read_box(chunk.path, offset, dtype, strides, within)

    def _fill(self, metadata: Any) -> None:
        """Join what each tensor is (``state_dict_metadata``) with where its chunks lie."""
        places: dict[tuple[str, Shape], Any] = {}
        for index, info in metadata.storage_data.items():
            if index.fqn in metadata.state_dict_metadata:
                places[index.fqn, tuple(getattr(index, "offset", None) or ())] = info
        for name, entry in metadata.state_dict_metadata.items():
            if not hasattr(entry, "chunks"):
                self.objects.append(name)
                continue
            chunks = []
            for chunk in entry.chunks:
                box: Box = tuple(
                    (int(a), int(a + n)) for a, n in zip(chunk.offsets, chunk.sizes, strict=True)
                )
                info = places.get((name, tuple(chunk.offsets)))
                if info is not None and all(start < stop for start, stop in box):
                    where = self.path / Path(info.relative_path).name
                    chunks.append(Chunk(box, where, info.offset, info.length))
            self._stored[name] = _Stored(tuple(entry.size), entry.properties.state[0], chunks)
            self._stored[name].index()

    def _check(self) -> Iterator[UserError]:
        """Files whole, chunks without holes."""
        ends: dict[Path, int] = defaultdict(int)
        for name, stored in self._stored.items():
            for chunk in stored.chunks:
                ends[chunk.path] = max(ends[chunk.path], chunk.offset + chunk.length)
            held = sum(prod(extent(chunk.box)) for chunk in stored.chunks)
            if held != prod(stored.shape):
                what = f"tensor {name}: {held} of {prod(stored.shape)} elements are stored"
                yield UserError(str(self.path), what, _AGAIN)
        for path, end in sorted(ends.items()):
            size = path.stat().st_size if path.is_file() else -1
            if size < end:
                what = "missing" if size < 0 else f"truncated: {size} bytes of {end}"
                yield UserError(str(path), what, _AGAIN)


def read_metadata(directory: Path) -> Any:
    """``.metadata``: a :class:`~megatron_btx.weights.safe_unpickle.Record` of torch's ``Metadata``.

    Raises:
        UserError: there is none, or it is damaged, or it names what no checkpoint needs.
    """
    path = directory / ".metadata"
    if not path.is_file():
        raise UserError(
            str(directory),
            "not a Megatron torch_dist checkpoint (no .metadata)",
            "give the directory of one saved step",
        )
    with path.open("rb") as file:
        return safe_unpickle.load(file, path, safe_unpickle.METADATA_NAMES)


def read_object(directory: Path, key: str) -> bytes | None:
    """The bytes of a stored thing that is no tensor (``torch.save`` wrote them), whole: Megatron
    calls its one shard ``KEY/shard_0_1``. ``None``: nothing of that name is stored.

    Raises:
        UserError: as :func:`read_metadata`; or the file that holds it is missing or truncated.
    """
    if not (directory / ".metadata").is_file():
        return None
    places = getattr(read_metadata(directory), "storage_data", None) or {}
    found = [info for index, info in places.items() if index.fqn == f"{key}/shard_0_1"]
    if not found:
        return None
    path = directory / Path(found[0].relative_path).name
    content = b""
    if path.is_file():
        with path.open("rb") as file:
            file.seek(found[0].offset)
            content = file.read(found[0].length)
    if len(content) < found[0].length:
        what = "truncated" if path.is_file() else "missing"
        raise UserError(str(path), f"{what}: it holds {key}", _AGAIN)
    return content


class _Window(io.RawIOBase):
    """Bytes ``offset .. offset + length`` of a file as a file of its own."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
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


def _payload(name: str, dtype: torch.dtype, chunk: Chunk) -> tuple[int, Shape]:
    """Byte offset in the file of a chunk's first element, and its strides in elements.

    The archive is ``torch.save`` of one tensor: ``data.pkl`` names storage, offset, size and
    strides; ``data/<key>`` holds the storage. A local file header is 30 bytes, a name, an extra
    field (torch pads with it), then the data.
    """
    where = f"{chunk.path}: {name}"
    try:
        with chunk.path.open("rb") as file:
            archive = zipfile.ZipFile(_Window(file, chunk.offset, chunk.length))
            members = {entry.filename.split("/", 1)[1]: entry for entry in archive.infolist()}
            if archive.read(members["byteorder"]) != b"little":
                raise UserError(where, "big-endian", "save it on a little-endian machine")
            header = archive.read(members["data.pkl"])
            tensor = safe_unpickle.loads(header, where, safe_unpickle.TENSOR_NAMES)
            (_, stored_dtype, key, _, _), first, size, strides = tensor.arguments[:4]
            entry = members[f"data/{key}"]
            file.seek(chunk.offset + entry.header_offset)
            local = file.read(30)
    except (zipfile.BadZipFile, KeyError, ValueError, AttributeError, TypeError) as error:
        raise UserError(where, f"corrupt: {error}", _AGAIN) from error
    start = entry.header_offset + 30
    start += int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    needed = (
        first + 1 + sum((n - 1) * s for n, s in zip(size, strides, strict=True))
    ) * dtype.itemsize
    own = [n for n in extent(chunk.box) if n != 1]
    sound = (
        stored_dtype == dtype
        and [n for n in size if n != 1] == own
        and entry.compress_type == zipfile.ZIP_STORED
        and needed <= entry.file_size
        and start + entry.file_size <= chunk.length
    )
    if not sound:
        what = f"holds {stored_dtype} {tuple(size)}: not what .metadata says"
        raise UserError(where, what, _AGAIN)
    # Axes of length one may be in the chunk's box and not in the tensor: any stride will do.
    left = iter(stride for n, stride in zip(size, strides, strict=True) if n != 1)
    expanded = tuple(0 if n == 1 else next(left) for n in extent(chunk.box))
    return chunk.offset + start + first * dtype.itemsize, expanded
