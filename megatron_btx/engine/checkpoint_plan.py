"""What a rank writes of a checkpoint, and its files: Megatron's planning and finishing of a
``torch_dist`` directory, in parts of which only the first needs the training thread.

Differs from Megatron's: ranks exchange plans where one has another than at the last save, and not
at every save; a shard need not be of a regular grid; a rank writes by itself, without further
processes, and hashes what it has written.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_btx.engine.distributed import is_first_rank
from megatron_btx.weights.file_hashes import hash_file

Shape = tuple[int, ...]

_FORMAT = ("torch_dist", 1)


@dataclass(frozen=True)
class Agreed:
    """What all ranks have said that they write; the same from save to save."""

    items: dict[tuple[Any, ...], WriteItem]
    """By what identifies it (``_identity``), in the order of the plan."""
    metadata: Metadata | None
    """Of the whole, on the first rank."""


@dataclass(frozen=True)
class Written:
    """What a rank has written."""

    results: list[WriteResult]
    hashes: dict[str, str]
    """Of each file, by its name."""


class Strategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Takes what Megatron has found to be saved; writes nothing yet."""

    def __init__(self, agreed: Agreed | None) -> None:
        super().__init__(*_FORMAT, thread_count=1)
        self.agreed = agreed
        self.data: list[tuple[WriteItem, Any]] = []
        """What this rank writes: an item of the plan, and its bytes or its tensor."""

    def async_save(self, sharded_state_dict: Any, *_: Any, **__: Any) -> AsyncRequest:
        """Agree with all ranks on the plan. Every rank calls it."""
        own = [one for one in nested_values(sharded_state_dict) if is_main_replica(one.replica_id)]
        found = {_identity(one): one for one in own}
        assert len(found) == len(own), "a shard has a place of its own"
        self.agreed = _agreement(found, self.agreed)
        items = self.agreed.items
        self.data = [(items[identity], _data(one)) for identity, one in found.items()]
        return AsyncRequest(None, (), [])


def _identity(entry: Any) -> tuple[Any, ...]:
    if isinstance(entry, ShardedObject):
        return (entry.unique_key,)
    extent = (1,) * entry.prepend_axis_num + tuple(entry.local_shape)
    return entry.key, tuple(entry.global_offset), extent, tuple(entry.global_shape), entry.dtype


@dataclass(frozen=True)
class _Object:
    """Something else than a tensor, as it is."""

    value: Any

    def packed(self) -> io.BytesIO:
        """As Megatron stores it."""
        file = io.BytesIO()
        torch.save([self.value], file)
        return file


def _data(entry: Any) -> Any:
    if isinstance(entry, ShardedObject):
        return _Object(entry.data)
    return entry.data.detach()[(None,) * entry.prepend_axis_num]


def _item(identity: tuple[Any, ...]) -> WriteItem:
    if len(identity) == 1:
        return WriteItem(MetadataIndex(*identity), WriteItemType.BYTE_IO)
    key, *shapes, dtype = identity
    offset, extent, whole = (torch.Size(shape) for shape in shapes)
    chunk = ChunkStorageMetadata(offset, extent)
    data = TensorWriteData(chunk, TensorProperties(dtype), whole)
    return WriteItem(MetadataIndex(key, offset), WriteItemType.SHARD, tensor_data=data)


def _agreement(found: dict[tuple[Any, ...], Any], agreed: Agreed | None) -> Agreed:
    """What all ranks agree on, which is what they agreed on before if no rank's part is another.

    Raises:
        ValueError: on the first rank: the parts do not make up every tensor.
    """
    same = agreed is not None and agreed.items.keys() == found.keys()
    votes = torch.tensor([int(same)], device=torch.cuda.current_device())
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    if agreed is not None and votes.item():
        return agreed
    items = {identity: _item(identity) for identity in found}
    plans = to_first_rank(SavePlan(list(items.values())))
    metadata = None
    if is_first_rank():
        _, metadata = DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)
    return Agreed(items, metadata)


def to_first_rank(value: Any) -> list[Any]:
    """Every rank's value on the first rank, on the others nothing. Every rank calls it."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * (dist.get_world_size() if is_first_rank() else 0)
    dist.gather_object(value, values or None)
    return values


def on_the_host(data: Sequence[tuple[WriteItem, Any]]) -> list[tuple[WriteItem, Any]]:
    """What is written, copied off the GPU where there is one. On a CPU all is left to who writes:
    a process that is forked off has what there was."""
    if not torch.cuda.is_available():
        return list(data)
    copied = [
        (item, one.packed() if isinstance(one, _Object) else one.to("cpu", non_blocking=True))
        for item, one in data
    ]
    torch.cuda.synchronize()
    return copied


def write(directory: Path, rank: int, data: Sequence[tuple[WriteItem, Any]]) -> Written | Exception:
    """Write a rank's file, and hash it.

    Args:
        directory: of the partial checkpoint.
        rank: this one.
        data: as :func:`on_the_host` returns it; nothing: there is no file.

    Returns:
        What was written, or what went wrong; an ``OSError`` where the disk did.
    """
    if not data:
        return Written([], {})
    objects = (
        (item, one.packed() if isinstance(one, _Object) else one)
        for item, one in data
        if not isinstance(one, torch.Tensor)
    )
    tensors = ((item, _whole(one)) for item, one in data if isinstance(one, torch.Tensor))
    name = f"__{rank}_0{DEFAULT_SUFFIX}"
    said: Any = queue.SimpleQueue()
    working: queue.Queue[int] = queue.Queue()
    working.put(0)
    try:
        directory.mkdir(exist_ok=True)  # on a network's disk this machine may not have seen it yet
        FileSystemWriterAsync.write_preloaded_data(
            [_writer(directory).transforms],
            0,
            (str(directory / name), name, (objects, tensors)),
            results_queue=said,
            count_queue=working,
            use_fsync=True,
        )
        results = said.get()[1]
        if isinstance(results, Exception):
            return _disk_error(results) or results
        return Written(results, {name: hash_file(directory / name)})
    except OSError as error:
        return error


def _writer(directory: Path) -> FileSystemWriterAsync:
    return FileSystemWriterAsync(str(directory), thread_count=1)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Not a view: with one, all that it is a part of would be written."""
    tensor = tensor.contiguous()
    is_view = tensor.untyped_storage().size() != tensor.numel() * tensor.itemsize
    return tensor.clone() if is_view else tensor


def finish(directory: Path, agreed: Agreed, outcomes: Sequence[Written | Exception]) -> None:
    """Write what says where everything lies. The first rank calls it, no other takes part.

    Args:
        directory: of the partial checkpoint.
        agreed: what all ranks agreed on.
        outcomes: every rank's of :func:`write`.

    Raises:
        OSError: the disk, on whichever rank.
        RuntimeError: some rank did not write its part.
    """
    for one in outcomes:
        if isinstance(one, OSError):
            raise one
        if isinstance(one, Exception):
            raise RuntimeError(f"{directory} was not written: {one!r}") from one
    assert agreed.metadata is not None
    results = [one.results for one in outcomes if isinstance(one, Written)]
    _writer(directory).finish(dataclasses.replace(agreed.metadata), results)
    save_config(CheckpointingConfig(*_FORMAT), str(directory))


def _disk_error(error: BaseException) -> OSError | None:
    """The disk's error behind an error, of which torch may pass on the words alone."""
    for one in _behind(error):
        if isinstance(one, OSError):
            return one
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
        if os.strerror(number) in str(error):
            return OSError(number, os.strerror(number))
    return None


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
