"""Independent pieces of work side by side, in processes that never outlive their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, Literal, TypeVar

from megatron_btx.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

_POLL = 0.5
"""Seconds between looks at how far the processes are."""

_counted: Any = None
"""In a worker: how much all of them have done together (a shared int64)."""
_stop: Any = None
"""In a worker: set when its result is not wanted any more."""
_watch: Callable[[int], None] = lambda amount: None  # noqa: E731
"""Where the work is done in this process: who is told how much more of it is done."""


class Cancelled(Exception):
    """The work was given up."""


def cores() -> int:
    """That this process may use: what its job asked for, too, where Slurm does not bind it."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(bound, int(asked)) if asked.isdecimal() and int(asked) else bound


def advance(amount: int) -> None:
    """Called by the work: so much more of it is done.

    Raises:
        Cancelled: the work was given up.
    """
    if _counted is None:
        _watch(amount)
        return
    if _stop.is_set():
        raise Cancelled
    with _counted.get_lock():
        _counted.value += amount


def _nothing() -> None:
    """The setup of work that needs none."""


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
    """``(i, work(tasks[i]))`` in the order in which they end.

    Args:
        work: a function of a module.
        tasks: what it is called with.
        workers: processes; 1: all of it in this one.
        setup: called first in every process.
        arguments: of ``setup``.
        watch: told of every :func:`advance`, in this process.
        start: how processes begin. A fork is safe only without threads, so without torch.

    Raises:
        UserError: a process was killed. Whatever ``work`` raises is raised too; what others still
            do is given up.
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
            "was killed, as the system does where memory is short",
            "begin again: what is finished is kept. Fewer cores (taskset) need less memory",
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


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
