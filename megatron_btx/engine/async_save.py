"""A checkpoint that is written while training goes on.

Megatron's own asynchronous save, of either release: the state is planned and, from a GPU, copied to
the host; a process forked off this one writes it (on a CPU it sees the state as it was when it was
forked, and what training then changes is copied page by page); when the processes of all ranks have
ended, the first rank completes the checkpoint and gives it its name, in a thread. What differs from
Megatron's: the process ends with its rank, writes by itself and no further processes, and hashes
what it has written.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import mmap
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.distributed import DistributedDataParallel
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType

from megatron_btx.engine import (
    checkpoint,
    checkpoint_directory,
    checkpoint_hashes,
    checkpoint_workers,
)
from megatron_btx.engine.checkpoint import TrainingState
from megatron_btx.engine.distributed import from_first_rank, is_first_rank
from megatron_btx.engine.model import model_chunks
from megatron_btx.files import find_json
from megatron_btx.weights.integrity import files_of, hash_file


class AsyncSave:
    """One checkpoint on its way. Every rank makes it and asks it, in the same order."""

    def __init__(
        self,
        directory: Path,
        state: TrainingState,
        manifest: dict[str, Any],
        add_files: Callable[[Path], None] | None = None,
    ) -> None:
        """Begin; as :func:`checkpoint.save`, but for what the disk says, which ``finished`` does.

        Raises:
            UserError: the directory cannot be made, or is not ours.
        """
        self.directory, self._manifest, self._add = directory, manifest, add_files
        self.begun = time.perf_counter()
        self._is_written = False
        self._completion: Future[None] | None = None
        """On the first rank, when all ranks have written: what gives the checkpoint its name."""
        self._calls = AsyncCallsQueue()
        partial = checkpoint_directory.partial_of(directory)
        self._hashes = partial / f".hashes-{dist.get_rank()}.tmp"
        with checkpoint_directory.disk_errors(directory):
            with _copied_by_the_fork():
                request = checkpoint.request(partial, directory, state, manifest)
            if request.async_fn is not None:
                write = functools.partial(_write, request.async_fn, os.getpid(), self._hashes)
                request = request._replace(async_fn=write)
            with _left_out(_gradients(state.model)):
                self._calls.schedule_async_request(request)

    def finished(self, *, wait: bool = False) -> bool:
        """Whether the checkpoint is whole and has its name; a rank that asks with ``wait`` waits.

        Raises:
            UserError: the disk was full or could not be written, on whichever rank.
        """
        with checkpoint_directory.disk_errors(self.directory):
            if not self._is_written:
                if not self._calls.maybe_finalize_async_calls(blocking=wait):
                    return False
                self._is_written = True
                self._complete_beside(checkpoint_hashes.joined(self._own_hashes()))
            done, error = wait, None
            if self._completion is not None:
                done = wait or self._completion.done()
                error = self._completion.exception() if done else None
            done, error = from_first_rank((done, error))
            if error is not None:
                raise error
        return bool(done)

    def _own_hashes(self) -> dict[str, str]:
        """Of what this rank's process has written."""
        known = (find_json(self._hashes) or {}) if self._hashes.exists() else {}
        self._hashes.unlink(missing_ok=True)
        return known

    def _complete_beside(self, known: dict[str, str]) -> None:
        """The first rank waits for the disk a few times more, and does so in a thread."""
        if not is_first_rank():
            return

        def complete() -> None:
            partial = checkpoint_directory.partial_of(self.directory)
            checkpoint.complete(partial, self._manifest, self._add)
            left = set(files_of(partial)) - known.keys()
            hashes = {**known, **{name: hash_file(partial / name) for name in left}}
            checkpoint.give_name(self.directory, hashes)

        threads = ThreadPoolExecutor(1)
        self._completion = threads.submit(complete)
        threads.shutdown(wait=False)


class _Writer(FileSystemWriterAsync):  # type: ignore[misc]
    """On a CPU: leaves the copy of views, which Megatron makes before the process is forked, to
    that process."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """As Megatron's for one file, but for that."""
        files: tuple[list[Any], list[Any]] = [], []
        for item in plan.items:
            data = planner.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                files[0].append((item, data))
            else:
                files[1].append((item, data.detach()))
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        place = str(Path(self.checkpoint_dir) / name)
        self.write_buckets = [(place, name, files)] if any(files) else []
        self.results_queue = filesystem_async._results_queue if any(files) else None


@contextlib.contextmanager
def _copied_by_the_fork() -> Iterator[None]:
    """Plan with ``_Writer``, where a fork copies what there is."""
    if torch.cuda.is_available():
        yield
        return
    with (
        mock.patch.object(filesystem_async, "FileSystemWriterAsync", _Writer),
        mock.patch.object(strategy, "FileSystemWriterAsync", _Writer, create=True),
    ):
        yield


def _gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """Megatron's buffers of them on a CPU, where the model is under its DDP."""
    found: list[torch.Tensor] = []
    for piece in model_chunks(model):
        if isinstance(piece, DistributedDataParallel):
            buffers = (*piece.buffers, *piece.expert_parallel_buffers)
            found += [buffer.grad_data for buffer in buffers if buffer.grad_data.is_cpu]
    return found


@contextlib.contextmanager
def _left_out(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """A process that is forked within does not have these: what a fork takes is the number of
    pages that it hands on."""
    if not sys.platform.startswith("linux"):
        yield
        return
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None)

    def advise(advice: int) -> None:
        for tensor in tensors:
            start = -(-tensor.data_ptr() // page) * page
            size = (tensor.data_ptr() + tensor.nbytes) // page * page - start
            if size > 0:
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)

    advise(mmap.MADV_DONTFORK)
    try:
        yield
    finally:
        advise(mmap.MADV_DOFORK)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Not a view: with one, all that it is a part of would be written."""
    is_view = tensor.untyped_storage().size() != tensor.numel() * tensor.itemsize
    return tensor.clone() if is_view else tensor


def _write(
    megatrons: functools.partial[None],
    parent: int,
    hashes: Path,
    _rank: int,
    buckets: Sequence[Any],
    results: Any,
) -> None:
    """In the process that is forked off: write each file, and its hash.

    Args:
        megatrons: what Megatron would run here; it starts processes of its own, which would outlive
            a rank that is killed (0.16), or threads (0.19).
        parent: the rank's process.
        hashes: where the hashes of the files go.
        buckets: (path, name, data) of each file.
        results: queue on which Megatron waits for what was written, or the error.
    """
    checkpoint_workers.end_with_parent(parent)
    torch.set_num_threads(1)  # OpenMP's threads are not there any more, and would be waited for
    transforms, written, found = megatrons.args[0], {}, {}
    for place, (path, name, (objects, tensors)) in enumerate(buckets):
        bucket = path, name, (objects, [(item, _whole(tensor)) for item, tensor in tensors])
        said: Any = queue.SimpleQueue()
        working: queue.Queue[int] = queue.Queue()
        working.put(place)
        FileSystemWriterAsync.write_preloaded_data(
            transforms, place, bucket, results_queue=said, count_queue=working, use_fsync=True
        )
        written[place] = said.get()[1]
        if isinstance(written[place], Exception):
            results.put(written[place])
            return
        found[name] = hash_file(Path(path))
    try:
        hashes.write_text(json.dumps(found), encoding="utf-8")
    except OSError as error:
        results.put(error)
        return
    results.put(written)
