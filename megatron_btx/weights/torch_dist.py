"""Megatron ``torch_dist`` directories, read by mapped slices.

A stored tensor is a global shape and a grid of chunks. Each chunk is one ``torch.save`` archive (an
uncompressed zip) somewhere inside a ``.distcp`` file, so the bytes of any slice of it lie at a
known place. The checkpoint library's own reader takes whole chunks and wants a process group;
this one takes the slice and wants nothing.
"""

from __future__ import annotations

import bisect
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_btx.errors import UserError, UserErrors, capped, shown
from megatron_btx.weights import safe_unpickle
from megatron_btx.weights.box import Box, Shape, extent, intersection, shifted, sizes, slices, told
from megatron_btx.weights.mmap_io import read_box
from megatron_btx.weights.read_torch_zip import Checksum, Chunk, Payload, payload_of
from megatron_btx.weights.source import FileSource

_AGAIN = "copy the checkpoint again, or take an earlier step"


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

    def overlaps(self) -> bool:
        """Whether some element lies in two chunks."""
        boxes = {chunk.box for chunk in self.chunks}
        if len(boxes) < len(self.chunks):
            return True
        for sides in zip(*boxes, strict=True):
            cuts = sorted(set(sides))
            if any(one[1] > other[0] for one, other in pairwise(cuts)):  # not a grid
                return any(sum(1 for _ in self.meeting(box)) > 1 for box in boxes)
        return False


class TorchDistSource(FileSource[_Stored]):
    """The tensors of a ``torch_dist`` directory under the names and shapes it stores.

    Args:
        path: the directory with ``.metadata``.

    Raises:
        UserError: no such checkpoint, a pickle that names anything unexpected.
        UserErrors: missing or truncated files and tensors whose chunks leave holes, all at once.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self._open(self.path / ".metadata")
        metadata = read_metadata(self.path)
        self.objects: list[str] = []
        """Names of stored things that are not tensors."""
        self._archives: dict[Chunk, Payload] = {}
        try:
            self._fill(metadata)
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise UserError(
                str(self.path / ".metadata"), f"not a checkpoint's metadata: {error}", _AGAIN
            ) from error
        errors = list(self._check())
        if errors:
            raise UserErrors(capped(errors))

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
        payload = self._payload(name, dtype, chunk)
        within = shifted(box, tuple(-start for start, _ in chunk.box))
        return read_box(chunk.path, payload.offset, dtype, payload.strides, within)

    def _payload(self, name: str, dtype: torch.dtype, chunk: Chunk) -> Payload:
        if chunk not in self._archives:
            self._archives[chunk] = payload_of(name, dtype, chunk)
        return self._archives[chunk]

    def checksums(self, names: Iterable[str]) -> dict[Path, list[Checksum]]:
        """The CRC-32 that is stored of every chunk of some tensors, by file, in their order there;
        a chunk that was saved without one has none."""
        found: dict[Path, list[Checksum]] = defaultdict(list)
        for name in names:
            stored = self._stored[name]
            for chunk in stored.chunks:
                checksum = self._payload(name, stored.dtype, chunk).checksum
                if checksum is not None:
                    found[chunk.path].append(checksum)
        return {path: sorted(each, key=lambda one: one.start) for path, each in found.items()}

    def _fill(self, metadata: Any) -> None:
        """Join what each tensor is (``state_dict_metadata``) with where its chunks lie."""
        places: dict[tuple[str, Shape], Any] = {}
        for index, info in metadata.storage_data.items():
            if index.fqn in metadata.state_dict_metadata:
                places[index.fqn, tuple(getattr(index, "offset", None) or ())] = info
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(name, str):
                raise TypeError(f"{told(name)} is no name")
            if not hasattr(entry, "chunks"):
                self.objects.append(name)
                continue
            shape, dtype = sizes(entry.size), entry.properties.state[0]
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"{shown(name)} is of type {told(dtype)}")
            chunks = []
            for chunk in entry.chunks:
                offsets, lengths = sizes(chunk.offsets), sizes(chunk.sizes)
                box: Box = tuple((a, a + n) for a, n in zip(offsets, lengths, strict=True))
                info = places.get((name, offsets))
                if info is not None and 0 not in lengths:
                    chunks.append(self._chunk(name, shape, dtype, box, info))
            self._stored[name] = _Stored(shape, dtype, chunks)
            self._stored[name].index()
        for file in sorted({c.path for stored in self._stored.values() for c in stored.chunks}):
            self._open(file)

    def _chunk(self, name: str, shape: Shape, dtype: torch.dtype, box: Box, info: Any) -> Chunk:
        (offset, length), file = sizes((info.offset, info.length)), Path(info.relative_path).name
        inside = all(stop <= size for (_, stop), size in zip(box, shape, strict=True))
        if not inside or prod(extent(box)) * dtype.itemsize > length:
            raise ValueError(f"{shown(name)}: a chunk {box} of {length} bytes, in {shape}")
        return Chunk(box, self.path / file, offset, length)

    def _check(self) -> Iterator[UserError]:
        """Files whole; chunks that hold every element once."""
        ends: dict[Path, int] = defaultdict(int)
        for name, stored in self._stored.items():
            for chunk in stored.chunks:
                ends[chunk.path] = max(ends[chunk.path], chunk.offset + chunk.length)
            held = sum(prod(extent(chunk.box)) for chunk in stored.chunks)
            if held != prod(stored.shape):
                what = f"tensor {shown(name)}: {held} of {prod(stored.shape)} elements are stored"
                yield UserError(str(self.path), what, _AGAIN)
            elif stored.overlaps():
                what = f"tensor {shown(name)}: some elements are stored twice, others not at all"
                yield UserError(str(self.path), what, _AGAIN)
        for path, end in sorted(ends.items()):
            size = path.stat().st_size if path.is_file() else -1
            if size < end:
                what = "missing" if size < 0 else f"truncated: {size} bytes of {end}"
                yield UserError(str(path), what, _AGAIN)


def read_metadata(directory: Path) -> Any:
    """``.metadata``: the :class:`.StubObject` of torch's ``Metadata``.

    Raises:
        UserError: there is none, or it is damaged, or it names something outside the allow-list.
    """
    path = directory / ".metadata"
    if not os.path.lexists(path):
        raise UserError(
            str(directory),
            "not a Megatron torch_dist checkpoint (no .metadata)",
            "give the directory of one saved step",
        )
    return safe_unpickle.load(path, safe_unpickle.METADATA_NAMES)


def read_object(directory: Path, key: str) -> bytes | None:
    """The bytes of a stored thing that is no tensor (``torch.save`` wrote them), whole, under that
    key or as Megatron-Core calls its one shard, ``KEY/shard_0_1``. ``None``: it is not stored.

    Raises:
        UserError: as :func:`read_metadata`; or the file that holds it is missing or truncated.
    """
    if not os.path.lexists(directory / ".metadata"):
        return None
    try:
        places = getattr(read_metadata(directory), "storage_data", None) or {}
        found = [info for index, info in places.items() if index.fqn in (key, f"{key}/shard_0_1")]
        if not found:
            return None
        offset, length = sizes((found[0].offset, found[0].length))
        path = directory / Path(found[0].relative_path).name
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            str(directory / ".metadata"), f"not a checkpoint's metadata: {error}", _AGAIN
        ) from error
    content = b""
    if path.is_file():
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(min(length, safe_unpickle.LIMIT))
    if len(content) < length:
        what = "truncated" if path.is_file() else "missing"
        raise UserError(str(path), f"{what}: it holds {key}", _AGAIN)
    return content
