"""A thread of every rank that looks at what the rank's own work would not notice. Imports no torch.

*A lost node.* A node that Slurm has lost may live on, and the ranks on it: the job has been started
anew elsewhere and waits for them (slurm/attempt.py). It leaves ``leave.json``, and they save and
end.

*A rank that hangs.* It is stopped, or its node is gone, and the others wait for it in a collective
operation. A rank that has done no step, and evaluated no micro-batch, for ``hang_minutes`` prints
the stacks of its threads and leaves a sign in ``hang/``; a little later those who have are ended,
and ``error.json`` names those who have not. Where the interpreter itself is stuck,
``faulthandler``'s own thread does the printing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_btx.engine.heartbeat import HEART
from megatron_btx.files import find_json, write_json
from megatron_btx.pipeline import state

HANG = "hang"
"""Directory of the signs, in the stage's; and the ``kind`` of the error."""

_EVERY = 5.0
"""Seconds between two looks."""
_TOGETHER = 10.0
"""Seconds within which ranks notice the same hang."""
_STUCK = 60.0
"""Seconds for which this thread may be kept from looking, beyond those of a hang."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Watchdog:
    """What is looked after.

    Args:
        directory: the stage's.
        rank: this process's.
        world_size: of the stage.
        grace: seconds that a rank gets to save and end when it is asked to leave.
        hang: seconds without a sign of work after which a rank hangs; 0: it may be silent for ever.
    """

    directory: Path
    rank: int
    world_size: int
    grace: float
    hang: float

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While the block runs."""
        over = threading.Event()
        HEART.begin()
        if self.rank == 0:
            shutil.rmtree(self.directory / HANG, ignore_errors=True)
        if self.hang or _in_job():
            threading.Thread(target=self._watch, args=(over,), daemon=True).start()
        try:
            yield
        finally:
            over.set()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self, over: threading.Event) -> None:
        in_job, every = _in_job(), min(_EVERY, self.hang or _EVERY)
        while not over.is_set():
            if self.hang:
                faulthandler.dump_traceback_later(self.hang + _STUCK, exit=True)
                if HEART.silence > self.hang:
                    self._hangs(over)
            if in_job and (self.directory / state.LEAVE).exists():
                self._leave(over)
            over.wait(every)

    def _leave(self, over: threading.Event) -> None:
        with contextlib.suppress(OSError):  # srun, which listened, may be gone
            sys.stderr.write("this job has been started anew elsewhere: saving and ending\n")
        os.kill(os.getpid(), signal.SIGUSR1)  # as Slurm does ahead of a time limit
        if not over.wait(self.grace):
            os._exit(1)

    def _hangs(self, over: threading.Event) -> None:
        """Print the stacks, tell who has not done so, and end this process."""
        sys.stderr.write(f"rank {self.rank}: {self._last}; what its threads are doing:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        sign = {"host": socket.gethostname(), "last": HEART.last, "time": time.time()}
        with contextlib.suppress(OSError):
            (self.directory / HANG).mkdir(exist_ok=True)
            write_json(self._sign(self.rank), sign)
        if over.wait(_TOGETHER) or HEART.silence < self.hang:  # it has got on after all
            self._sign(self.rank).unlink(missing_ok=True)
            return
        ranks = range(self.world_size)
        silent = [rank for rank in ranks if find_json(self._sign(rank)) is None]
        what = f"rank {self.rank}: {self._last}"
        if silent:
            what += f"; no sign of rank {', '.join(map(str, silent))}: stopped, or its node is lost"
        fix = "see the stacks in the log; run or submit again, it goes on from its last checkpoint"
        record = {"kind": HANG, "rank": self.rank, "message": f"{what}\n  fix: {fix}"}
        with contextlib.suppress(OSError):
            if not (self.directory / "error.json").exists():
                write_json(self.directory / "error.json", record)
        sys.stderr.write(f"{what}\n")
        sys.stderr.flush()
        os._exit(1)

    @property
    def _last(self) -> str:
        return (
            f"nothing done for {HEART.silence / 60:.1f} minutes, since {HEART.last or 'it began'}"
        )

    def _sign(self, rank: int) -> Path:
        return self.directory / HANG / f"rank-{rank}.json"


def _in_job() -> bool:
    """Outside of Slurm nobody asks ranks to leave."""
    return "SLURM_JOB_ID" in os.environ
