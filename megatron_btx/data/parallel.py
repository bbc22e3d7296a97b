"""Independent tasks in parallel, in processes that never outlive their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any, Literal, TypeVar

from megatron_btx.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

_POLL = 0.5
"""Seconds between looks at how far the processes are."""

_counted: Any = None
"""In a worker: how much work all workers have done (a shared int64)."""
_stop: Any = None
"""In a worker: set when its result is no longer needed."""
_watch: Callable[[int], None] = lambda amount: None  # noqa: E731
"""If the work is done in this process: called with each amount of work done."""


class Cancelled(Exception):
    """The result is no longer needed."""


def cores() -> int:
    """How many cores this process may use. Where Slurm does not bind processes to cores, at most as
    many as its job asked for."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(bound, int(asked)) if asked.isdecimal() and int(asked) else bound


def advance(amount: int) -> None:
    """Report an amount of work done; called by the tasks.

    Raises:
        Cancelled: the result is no longer needed.
    """
    if _counted is None:
        _watch(amount)
        return
    if _stop.is_set():
        raise Cancelled
    with _counted.get_lock():
        _counted.value += amount


def _nothing() -> None:
    """The setup of tasks that need none."""


def run_all(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int,
    setup: Callable[..., None] = _nothing,
    arguments: tuple[Any, ...] = (),
    watch: Callable[[int], None] = lambda amount: None,
    start: Literal["spawn", "fork"] = "spawn",
) -> Iterator[tuple[int, Result]]:
    """``(i, work(tasks[i]))`` in the order in which the tasks end.

    Args:
        work: a module-level function.
        tasks: its arguments, one a task.
        workers: number of processes; with 1 everything runs in this one.
        setup: called first in every process.
        arguments: of ``setup``.
        watch: called in this process with the amounts that the tasks report by :func:`advance`.
        start: how processes are started. A fork is safe only without threads, so without torch.

    Raises:
        UserError: a process was killed. Exceptions of ``work`` are raised too; the other tasks are
            then cancelled.
    """
    if workers < 2 or not tasks:
        global _watch
        _watch = watch
        setup(*arguments)
        yield from ((i, work(task)) for i, task in enumerate(tasks))
        return
    context = multiprocessing.get_context(start)
    counted, stop = context.Value("q", 0), context.Event()
    begin = (counted, stop, setup, arguments)
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=begin)
    told = 0
    try:
        with _without_interrupts():
            left = {pool.submit(work, task): i for i, task in enumerate(tasks)}
        while left:
            ended, _ = wait(left, _POLL, FIRST_COMPLETED)
            watch(counted.value - told)
            told = counted.value
            for future in sorted(ended, key=lambda future: left[future]):
                yield left.pop(future), future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} processes",
            "was killed, probably because memory ran out",
            "run again (finished parts are kept), with fewer cores (taskset) if memory is short",
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started in the block never hear of Ctrl-C, which a terminal sends to them
    too: their parent ends them."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _begin(counted: Any, stop: Any, setup: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    global _counted, _stop
    _counted, _stop = counted, stop
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    setup(*arguments)


def _end_with(parent: int) -> None:
    connection.wait([parent])
    os._exit(1)
