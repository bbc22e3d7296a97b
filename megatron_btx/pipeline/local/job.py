"""One attempt at one stage: its ranks as processes of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_btx.pipeline import state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.local import reaper
from megatron_btx.pipeline.local.launch import Launcher, Rank

Verdict = Literal["done", "stopped", "failed"]

_PATIENCE = 5.0
"""Seconds that the other ranks get to end by themselves after one of them has failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSetting:
    """What all jobs of a run share."""

    recipe: Path
    """The recipe that the ranks read: the copy in the run's directory."""
    run_dir: Path
    launcher: Launcher
    """What starts the ranks."""
    token: str
    """The run's mark (reaper.py)."""
    scratch: Path
    """A directory of this machine for the files through which ranks find each other."""


class StageJob:
    """The ranks of one attempt, started when this is made.

    The ranks are started directly, not by torchrun: that turns every exit code into 1, also after a
    clean exit on SIGTERM, and leaves its ranks behind when a signal ends it. Each has a session of
    its own, so that Ctrl-C in the terminal reaches this program alone.
    """

    def __init__(self, stage: Stage, setting: RunSetting, gpus: Sequence[str] = ()) -> None:
        self.stage, self.gpus = stage, tuple(gpus)
        self.directory = setting.run_dir / stage.directory
        self.attempt = state.next_attempt(self.directory)
        self.log = state.log_file(self.directory, self.attempt)
        self.mark = f"{setting.token}/{stage.directory}/{self.attempt}"
        self.started = time.monotonic()
        self.stopping = False
        self._run_dir = setting.run_dir
        self._failed_at: float | None = None
        self._asked_at: float | None = None
        state.begin(self.directory, self.attempt, stage.world_size)
        arguments = (str(setting.recipe), stage.name)
        # A file instead of a port: a free port found now may be taken when rank 0 binds it.
        rendezvous = setting.scratch / f"{stage.directory}-{self.attempt}"
        shared = {
            **os.environ,
            "WORLD_SIZE": str(stage.world_size),
            "LOCAL_WORLD_SIZE": str(stage.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "BTX_INIT_METHOD": f"file://{rendezvous}",
            "BTX_ATTEMPT": str(self.attempt),
            "BTX_STAGE_KEY": stage.key,
            "BTX_PARENT": str(os.getpid()),
            reaper.MARK: self.mark,
            "OMP_NUM_THREADS": str(stage.num_threads),
            "PYTHONUNBUFFERED": "1",
            # All ranks are here: no need of a name server that knows this machine.
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            # What a killed rank leaves here (checkpoint writers' sockets, W&B's media) is removed
            # with it.
            "TMPDIR": str(setting.scratch),
        }
        if self.gpus:
            shared["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        self.ranks: list[Rank] = []
        for rank in range(stage.world_size):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.ranks.append(setting.launcher.start(arguments, environment, self.log))

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of this attempt so far."""
        return time.monotonic() - self.started

    def poll(self) -> Verdict | None:
        """How the attempt ended; ``None`` while it runs. A rank that fails takes the others with
        it: they would wait for it in a collective."""
        codes = [rank.poll() for rank in self.ranks]
        if any(code not in (None, 0, state.EXIT_STOPPED) for code in codes):
            self._failed_at = self._failed_at or time.monotonic()
        if None not in codes:
            reaper.kill_marked(self.mark, grace=2.0)
            return self._verdict()
        if self._failed_at is not None:
            waited = time.monotonic() - self._failed_at
            if waited > 2 * _PATIENCE:
                self.kill()
            elif waited > _PATIENCE:
                self._send(signal.SIGCONT)  # one that was stopped tells where, then (watchdog.py)
                self._send(signal.SIGTERM)
        return None

    def stop(self, grace: float) -> None:
        """Ask the ranks to save and end; kill them when they have not after ``grace`` seconds.
        Called again and again while they do."""
        self.stopping = True
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._send(signal.SIGTERM)
        elif time.monotonic() - self._asked_at > grace:
            self.kill()

    def kill(self) -> None:
        """End the ranks and all that they started, now."""
        self._send(signal.SIGKILL)
        reaper.kill_marked(self.mark)

    def message(self) -> tuple[str, bool]:
        """What went wrong, and whether the user can put it right."""
        record = state.find_json(self.directory / "error.json")
        if record is not None:
            return str(record.get("message")), record.get("kind") == "user"
        if shutil.disk_usage(self.directory).free < 1 << 20:  # not even for error.json
            return f"{self.directory}: no space left on its disk\n  fix: free some, run again", True
        codes = [rank.returncode for rank in self.ranks]
        bad, code = next(((rank, code) for rank, code in enumerate(codes) if code), (0, 0))
        if code == 0:
            return "its ranks ended without finishing it", False
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return f"rank {bad} was ended by {name}{hint}", False
        return f"rank {bad} ended with exit code {code}", False

    def last_lines(self, count: int = 20) -> list[str]:
        """The end of the log."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 200 * count))
            return file.read().decode(errors="replace").splitlines()[-count:]

    def _verdict(self) -> Verdict:
        if state.done(self._run_dir, self.stage) is not None:
            return "done"
        if self._failed_at is not None and not self.stopping:
            return "failed"  # though a rank may have saved when it was told to go
        if self.stopping or (self.directory / "stopped.json").exists():
            return "stopped"
        return "failed"

    def _send(self, number: int) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                rank.send_signal(number)
