"""A checkpoint that is written while training goes on.

The state is planned and, from a GPU, copied to the host; a process that Megatron forks off this one
writes it (on a CPU it sees the state as it was when it was forked, and what training then changes
is copied page by page); when the processes of all ranks have ended, the first rank completes the
checkpoint and gives it its name, in a thread. The process ends with its rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import mmap
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.distributed import DistributedDataParallel

from megatron_btx.engine import (
    checkpoint,
    checkpoint_directory,
    checkpoint_plan,
    child_processes,
)
from megatron_btx.engine.checkpoint import TrainingState
from megatron_btx.engine.distributed import from_first_rank, is_first_rank
from megatron_btx.engine.model import model_chunks

_KILLED = RuntimeError("the process that writes it was killed")


class AsyncSave:
    """One checkpoint on its way. Every rank makes it and asks it, in the same order."""

    def __init__(
        self,
        directory: Path,
        state: TrainingState,
        manifest: dict[str, Any],
        add_files: Callable[[Path], None] | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Begin; as :func:`checkpoint.save`, but for what the disk says, which ``finished`` does.

        Args:
            directory, state, manifest, add_files: as :func:`checkpoint.save` takes them.
            then: what the first rank does when the checkpoint has its name, in its thread.

        Raises:
            UserError: the directory cannot be made, or is not ours.
        """
        self.directory, self._manifest, self._add, self._then = directory, manifest, add_files, then
        self.begun = time.perf_counter()
        self._is_written = False
        self._completion: Future[None] | None = None
        """On the first rank, when all ranks have written: what gives the checkpoint its name."""
        self._calls = AsyncCallsQueue()
        self._outcome: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - read and closed in finished
        """Where the process leaves what it has written, or its error: a file of no name."""
        with checkpoint_directory.disk_errors(directory):
            self._planned = checkpoint.plan(directory, state, manifest)
            data = checkpoint_plan.on_the_host(self._planned.data)
            partial = checkpoint_directory.partial_of(directory)
            write = functools.partial(_write, os.getpid(), self._outcome, partial)
            request = AsyncRequest(write, (dist.get_rank(), data), [])
            with child_processes.block_signals(), _left_out(_gradients(state.model)):
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
                self._complete_beside(checkpoint_plan.to_first_rank(self._own_outcome()))
            done, error = wait, None
            if self._completion is not None:
                done = wait or self._completion.done()
                error = self._completion.exception() if done else None
            done, error = from_first_rank((done, error))
            if error is not None:
                raise error
        return bool(done)

    def _own_outcome(self) -> bytes:
        """What this rank's process has said."""
        with self._outcome as file:
            file.seek(0)
            return file.read()

    def _complete_beside(self, outcomes: list[bytes]) -> None:
        """The first rank waits for the disk a few times more, and does so in a thread."""
        if not is_first_rank():
            return

        def complete() -> None:
            found = [pickle.loads(one) if one else _KILLED for one in outcomes]
            checkpoint.complete(self.directory, self._planned, found, self._manifest, self._add)
            if self._then is not None:
                self._then()

        threads = ThreadPoolExecutor(1)
        self._completion = threads.submit(complete)
        threads.shutdown(wait=False)


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
    """Leave these out of a process that is forked within (MADV_DONTFORK): the time of a fork grows
    with the number of pages that it copies."""
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


def _write(
    parent: int, outcome: IO[bytes], partial: Path, rank: int, data: Sequence[tuple[Any, Any]]
) -> None:
    """In the process that is forked off: write this rank's part.

    Args:
        parent: the rank's process.
        outcome: where what was written is said, or the error.
        partial: directory of the checkpoint.
        rank: this one.
        data: as :func:`checkpoint_plan.write` takes it.
    """
    child_processes.end_with_parent(parent)
    torch.set_num_threads(1)  # OpenMP's threads are not there any more, and would be waited for
    said = io.BytesIO()
    pickle.dump(checkpoint_plan.write(partial, rank, data), said)
    outcome.write(said.getvalue())
    outcome.flush()
