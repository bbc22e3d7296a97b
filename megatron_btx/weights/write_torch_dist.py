"""The sink for Megatron: ``torch_dist`` directories, written piece by piece.

Tensors are stored as Megatron's own jobs store them (stacked over layers and experts under their
global shapes), one chunk a canonical tensor, so any layout loads them through Megatron's
``dist_checkpointing``. Neither Megatron nor a process group is needed to write them.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.names import EMBEDDING, HEAD
from megatron_btx.weights.box import Box, Shape, extent, slabs, whole
from megatron_btx.weights.directory import LargeFile, as_json, write_directory
from megatron_btx.weights.execute import ONE_BY_ONE, Execution
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.megatron import extra_states, second_names, stored
from megatron_btx.weights.plan import Plan
from megatron_btx.weights.write_torch_zip import ALIGN, Archive

SHARD = 2 << 30
"""Bytes a file, about: what an interrupted run loses at most."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.*)")


@dataclass(frozen=True, eq=False)
class _Chunk:
    """A box of a canonical tensor, at its place in the tensor that Megatron stores."""

    key: str
    shape: Shape
    """Of the stored tensor."""
    index: Shape
    """Layer and expert: where stacking puts the canonical tensor."""
    made_of: Expression
    box: Box

    @property
    def offset(self) -> Shape:
        """Of the chunk in the stored tensor."""
        return (*self.index, *(start for start, _ in self.box))

    @property
    def size(self) -> Shape:
        """Of the chunk in the stored tensor."""
        return (1,) * len(self.index) + extent(self.box)

    @property
    def archive(self) -> Archive:
        """What the chunk is written as."""
        return Archive(self.size, self.made_of.dtype)


@dataclass(frozen=True)
class _File:
    name: str
    chunks: Sequence[_Chunk]
    offsets: Sequence[int]
    nbytes: int


def write_torch_dist(
    plan: Plan,
    out: Path,
    *,
    files: Callable[[], Mapping[str, bytes]] = dict,
    shard: int = SHARD,
    execution: Execution = ONE_BY_ONE,
    check: Callable[[Path], object] = lambda _directory: None,
) -> None:
    """Write a plan over canonical names as a ``torch_dist`` directory.

    Args:
        plan: over canonical names.
        out: the directory; appears when it is whole.
        files: what else goes into it, asked for at the end (``manifest.json``).
        shard: bytes a file; a larger tensor is cut into several chunks.
        execution: how; no bit of the result depends on it.
        check: called with the directory before it gets its name.

    Raises:
        UserError: see :func:`write_directory`.
    """
    layout = list(_files(plan, shard))
    large_files = [
        LargeFile(file.name, file.nbytes, partial(_write, plan, file, execution)) for file in layout
    ]

    def small() -> dict[str, bytes]:
        plan.check_unchanged()
        return {
            ".metadata": pickle.dumps(_metadata(layout, plan.architecture)),
            _extra_file(layout): _saved([None]),
            "common.pt": _common(),
            "metadata.json": as_json(backends | versions),
            **files(),
        }

    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {"sharded_backend_version": 1, "common_backend_version": 1}
    write_directory(
        out,
        identity=f"torch_dist {shard} {plan.identity}",
        large_files=large_files,
        workers=execution.workers,
        files=small,
        check=check,
    )


def _files(plan: Plan, shard: int) -> Iterator[_File]:
    """Chunks file by file in the plan's order, each with its place."""
    chunks: list[_Chunk] = []
    offsets: list[int] = []
    count = end = 0
    for chunk in _chunks(plan, shard):
        length = chunk.archive.nbytes
        if chunks and end + length > shard:
            yield _File(f"__0_{count}.distcp", chunks, offsets, end)
            chunks, offsets, count, end = [], [], count + 1, 0
        chunks.append(chunk)
        offsets.append(-(-end // ALIGN) * ALIGN)
        end = offsets[-1] + length
    if chunks:
        yield _File(f"__0_{count}.distcp", chunks, offsets, end)


def _chunks(plan: Plan, shard: int) -> Iterator[_Chunk]:
    layers, experts = plan.architecture.model.num_layers, len(plan.architecture.experts)
    for name, target in plan.targets.items():
        key = name
        stacked: Shape = ()
        index: Shape = ()
        if name in (EMBEDDING, HEAD):
            padded = (plan.architecture.padded_vocab_size, *target.shape[1:])
            target = stored(name, padded, plan.targets)
        if layer := _LAYER.fullmatch(name):
            key, stacked, index = f"decoder.layers.{layer[2]}", (layers,), (int(layer[1]),)
            if expert := _EXPERT.fullmatch(layer[2]):
                key = f"decoder.layers.mlp.experts.experts.{expert[2]}"
                stacked, index = (layers, experts), (*index, int(expert[1]))
        for box in slabs(whole(target.shape), max(1, shard // target.dtype.itemsize)):
            yield _Chunk(key, (*stacked, *target.shape), index, target, box)


def _write(plan: Plan, file: _File, execution: Execution, out: BinaryIO) -> None:
    errors: list[UserError] = []
    for chunk, offset in zip(file.chunks, file.offsets, strict=True):
        out.write(b"\0" * (offset - out.tell()))
        chunk.archive.write(out, execution.stream(plan, chunk.made_of, errors, chunk.box))
    if errors:
        raise UserErrors(errors)


def _metadata(layout: Sequence[_File], architecture: Architecture) -> Metadata:
    """What ``torch.distributed.checkpoint`` knows of the directory. A second name is a second entry
    for the same bytes, and so is every ``_extra_state`` for one ``None``."""
    tensors: dict[str, TensorStorageMetadata] = {}
    objects: dict[str, BytesStorageMetadata] = {}
    second = second_names(architecture)
    places: dict[MetadataIndex, _StorageInfo] = {}
    for file in layout:
        for chunk, offset in zip(file.chunks, file.offsets, strict=True):
            entry = tensors.setdefault(
                chunk.key,
                TensorStorageMetadata(
                    TensorProperties(dtype=chunk.made_of.dtype), torch.Size(chunk.shape), []
                ),
            )
            entry.chunks.append(
                ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.size))
            )
            index = MetadataIndex(chunk.key, chunk.offset)
            places[index] = _StorageInfo(file.name, offset, chunk.archive.nbytes)
            if chunk.key in second:
                index = MetadataIndex(second[chunk.key], chunk.offset)
                places[index] = _StorageInfo(file.name, offset, chunk.archive.nbytes)
    tensors |= {other: tensors[name] for name, other in second.items()}
    none = _StorageInfo(_extra_file(layout), 0, len(_saved([None])))
    for key, shape, at in extra_states(architecture):
        name = f"{key}/shard_{'.'.join(map(str, at))}_{'.'.join(map(str, shape))}"
        objects[name], places[MetadataIndex(name)] = BytesStorageMetadata(), none
    return Metadata(
        {**tensors, **objects}, storage_data=places, storage_meta=StorageMeta(), version="1.0.0"
    )


def _common() -> bytes:
    """What is stored once for all: the form of the names, and that the rows of QKV are grouped by
    query group (Megatron-LM reorders those of a checkpoint that does not say version 3)."""
    content = {"content_metadata": {"singleton_local_shards": False}, "checkpoint_version": 3.0}
    return _saved(content)


def _extra_file(layout: Sequence[_File]) -> str:
    return f"__0_{len(layout)}.distcp"


def _saved(content: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()
