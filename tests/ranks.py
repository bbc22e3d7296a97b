"""A pool of gloo ranks kept for the whole test session.

Importing torch and Megatron costs seconds; the process from which the ranks are forked pays it
once. Every case lays fresh process groups over as many of the ranks as it needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil

_PR_SET_PDEATHSIG = 1
# CUDA does not live on in a fork.
_context = multiprocessing.get_context("spawn" if os.environ.get("BTX_TEST_GPU") else "forkserver")
_context.set_forkserver_preload(["tests.preloaded"])


class RankError(AssertionError):
    """A case failed on a rank; carries that rank's traceback."""


class Ranks:
    """Up to ``most`` processes, started when first needed."""

    def __init__(self, most: int = 4) -> None:
        self.most = most
        self._workers: list[tuple[Any, Connection]] = []
        self._cases = itertools.count()
        self._folder = tempfile.TemporaryDirectory()

    def run(
        self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 600
    ) -> list[Any]:
        """Call ``function(*args)`` on ranks 0..world_size-1; their results in order of rank.

        ``function`` is a module's, so that it can be found by name in the ranks. It runs with
        torch.distributed's environment set and nothing initialised.

        Raises:
            RankError: it raised on some rank, or did not end in time.
        """
        assert world_size <= self.most
        self._start(world_size)
        environment = {
            "WORLD_SIZE": str(world_size),
            "BTX_INIT_METHOD": f"file://{self._folder.name}/case-{next(self._cases)}",
        }
        chosen = self._workers[:world_size]
        for rank, (_, pipe) in enumerate(chosen):
            pipe.send((function, args, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
        results, failures = [], []
        for rank, (_, pipe) in enumerate(chosen):
            # After one failure the others may wait for the failed rank for ever.
            if not pipe.poll(timeout if not failures else 5):
                failures.append(f"rank {rank} did not end in time")
                continue
            try:
                good, value = pipe.recv()
            except (EOFError, ConnectionResetError):
                failures.append(f"rank {rank} died")
                continue
            if good:
                results.append(value)
            else:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            self.close()
            raise RankError("\n".join(failures))
        return results

    def _start(self, count: int) -> None:
        while len(self._workers) < count:
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_serve, args=(theirs,), daemon=False)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def close(self) -> None:
        """End every process."""
        for process, pipe in self._workers:
            pipe.close()
            with contextlib.suppress(psutil.NoSuchProcess):  # it may have died of its case
                # With what it started: Megatron's checkpoint writer keeps a manager process.
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.join()
        self._workers.clear()

    def __del__(self) -> None:
        self.close()


def _serve(pipe: Connection) -> None:
    # What it is forked from ends with the tests.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args, environment = pipe.recv()
        except EOFError:
            return
        # Megatron's models leave their choice of attention there, and refuse another one.
        for name in [name for name in os.environ if name.startswith("NVTE_")]:
            del os.environ[name]
        os.environ.update(environment)
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        _let_go()
        pipe.send(answer)


def _let_go() -> None:
    """End the case's process groups with all that holds one.

    A group of gloo's has a thread that looks for work a hundred times a second for as long as
    anything refers to the group. Two things of Megatron's keep a whole model, and so its groups,
    past the model's life: a dispatcher keeps the last step's graph, whose gradient accumulators
    call back into the model; and rotary embeddings are cached by instance.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

    for value in gc.get_objects():
        if isinstance(value, MoETokenDispatcher):
            value.probs = None
    RotaryEmbedding.forward.cache_clear()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():  # a stage's worker has left its own
        dist.destroy_process_group()
    gc.collect()
