"""Reading boxes of tensors out of files without loading the files.

A file is mapped only where a box lies and only while the box is in use, so resident memory (mapped
pages count) stays at what is being worked on, however large the files are.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterable
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_btx.weights.box import Box, Shape, extent


def read_box(path: Path, offset: int, dtype: torch.dtype, strides: Shape, box: Box) -> Tensor:
    """The elements of ``box`` of a tensor that begins at byte ``offset`` of a file.

    Args:
        path: the file; a box that reaches past its end raises ``ValueError``.
        offset: where the tensor's element at index zero lies.
        dtype: little-endian, as every checkpoint format here.
        strides: in elements.
        box: which elements.

    Returns:
        A read-only view of mapped pages, kept alive by the tensor; a copy where the file does not
        align the elements.
    """
    shape = extent(box)
    first = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    begin = offset + first * dtype.itemsize
    mapped = _map(path, begin, span * dtype.itemsize, populate=span == prod(shape))
    if begin % dtype.itemsize == 0:
        return mapped.view(dtype).as_strided(shape, strides)
    raw = mapped.as_strided(
        (*shape, dtype.itemsize), (*(stride * dtype.itemsize for stride in strides), 1)
    )
    return raw.clone(memory_format=torch.contiguous_format).view(dtype).reshape(shape)


def stamp_of(paths: Iterable[Path]) -> str:
    """Names, sizes and times of files: changes when one of them is written again."""
    stats = [(path, path.stat()) for path in sorted(paths)]
    return "; ".join(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)


def state_of(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written to, or another takes its place: inode, size in bytes,
    time of the last write in ns; ``None`` where it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _map(path: Path, begin: int, length: int, *, populate: bool) -> Tensor:
    """Bytes ``begin .. begin + length`` of a file as a uint8 tensor over mapped pages."""
    page = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    flags = mmap.MAP_PRIVATE
    if populate:  # all of it is wanted: one system call instead of a fault every 64 KiB
        flags |= getattr(mmap, "MAP_POPULATE", 0)
    with open(path, "rb") as file:
        pages = mmap.mmap(
            file.fileno(), begin - page + length, flags=flags, prot=mmap.PROT_READ, offset=page
        )
    _accept_read_only()
    return torch.frombuffer(pages, dtype=torch.uint8, offset=begin - page, count=length)


@cache
def _accept_read_only() -> None:
    """Torch warns, once a process, of a tensor over read-only memory. Ours are meant to be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.frombuffer(b"\0", dtype=torch.uint8)
