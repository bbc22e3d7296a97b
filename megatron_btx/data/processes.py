"""Independent pieces of work side by side, in forked processes that never outlive their parent."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from megatron_btx.data import Progress

Result = TypeVar("Result")
Watch = Callable[[int], None]
"""Told how much more of the work is done."""


def run_side_by_side(
    work: Callable[[str, Watch], Result],
    names: Sequence[str],
    total: int,
    progress: Progress,
    what: str,
) -> dict[str, Result]:
    """``{name: work(name, watch)}``, each in a process of its own where that is safe.

    A process with torch in it holds threads and locks that a fork breaks: there, and where there
    is one core or no fork, the pieces are done one by one. ``total`` is what all ``watch`` calls
    add up to.
    """
    done = 0

    def watch(amount: int) -> None:
        nonlocal done
        done += amount
        progress(what, min(done / max(total, 1), 1.0))

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if cores < 2 or len(names) < 2 or "torch" in sys.modules:
        return {name: work(name, watch) for name in names}

    context = multiprocessing.get_context("fork")
    workers: dict[Connection, tuple[str, Any]] = {}
    results: dict[str, Result] = {}
    try:
        for name in names:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(work, name, theirs, os.getpid()))
            process.start()
            theirs.close()
            workers[ours] = (name, process)
        while len(results) < len(names):
            for ready in wait([c for c, (name, _) in workers.items() if name not in results]):
                assert isinstance(ready, Connection)
                name, process = workers[ready]
                try:
                    kind, value = ready.recv()
                except EOFError:
                    raise RuntimeError(f"the process for {name} was killed") from None
                if kind == "error":
                    raise value
                if kind == "done":
                    results[name] = value
                else:
                    watch(value)
    finally:
        for _, process in workers.values():
            if len(results) < len(names):
                process.terminate()
            process.join()
    return {name: results[name] for name in names}


def _child(
    work: Callable[[str, Watch], Result], name: str, parent: Connection, parent_id: int
) -> None:
    pending = 0

    def watch(amount: int) -> None:
        nonlocal pending
        if os.getppid() != parent_id:  # the parent was killed: leave no orphan
            os._exit(1)
        pending += amount
        if pending > 100_000:
            parent.send(("watch", pending))
            pending = 0

    try:
        parent.send(("done", work(name, watch)))
    except BaseException as error:
        parent.send(("error", error))
