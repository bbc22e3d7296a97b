"""Runs a recipe's stages on this machine, as many side by side as it holds. Imports no torch."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_btx.errors import EXIT_INTERRUPTED, UserError
from megatron_btx.files import written
from megatron_btx.pipeline import locks, state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.local import reaper
from megatron_btx.pipeline.local.job import RunSetting, StageJob
from megatron_btx.pipeline.local.launch import launcher_here
from megatron_btx.pipeline.local.progress import ProgressView
from megatron_btx.pipeline.local.rollback import Rollback

GRACE = 600.0
"""Seconds that a stopped stage gets to save; a second Ctrl-C ends the wait."""


@dataclass(kw_only=True)
class Outcome:
    """How a run ended."""

    code: int = 0
    """0 done, 130 stopped, 2 a mistake of the user's, 1 a crash."""
    finished: list[str] = field(default_factory=list)
    """Stages that were finished by this run."""
    stopped: list[str] = field(default_factory=list)
    """Stages that were stopped on the way and go on next time."""
    problem: str = ""
    """What failed, with the end of its log; empty if nothing did."""


def run(
    stages: tuple[Stage, ...],
    run_dir: Path,
    recipe_text: str,
    *,
    view: ProgressView,
    max_parallel: int | None = None,
    inline: Mapping[str, Callable[[], object]] | None = None,
    grace: float = GRACE,
    share: Sequence[str] = (),
) -> Outcome:
    """Run what is left of ``stages``.

    Args:
        stages: as ``graph.build`` gives them, each after all that it needs.
        run_dir: where everything is written; made if missing.
        recipe_text: the resolved recipe, kept as ``recipe.yaml``; the ranks read this copy, so that
            an edit of the original during the run changes nothing.
        max_parallel: at most this many stages at once; by default what the cores hold.
        inline: kinds that are a function of this process instead of ranks.
        grace: seconds that a stopped stage gets to save.
        share: other runs' directories, ``*`` allowed; what is finished there is linked here.

    Raises:
        UserError: another run holds the directory.
    """
    with contextlib.ExitStack() as stack:
        rollback = stack.enter_context(Rollback(run_dir, stages, view))
        token = uuid.uuid4().hex
        scratch = Path(tempfile.mkdtemp(prefix="btx-"))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        # Before the lock: the watcher must not share it.
        stack.enter_context(reaper.watcher(token, scratch))
        stack.enter_context(locks.run_lock(run_dir))
        rollback.arm()
        rollback.wanted = True  # until the first stage begins
        with written(run_dir / "recipe.yaml") as file:
            file.write(recipe_text)
        launcher = stack.enter_context(contextlib.closing(launcher_here(gpus())))
        setting = RunSetting(
            recipe=run_dir / "recipe.yaml",
            run_dir=run_dir,
            launcher=launcher,
            token=token,
            scratch=scratch,
        )
        for name, there in state.link_shared(run_dir, stages, share).items():
            view.note(f"{name}: shared with {there.parent}")
        signals = stack.enter_context(_Signals())
        stack.enter_context(view)
        runner = _Runner(
            stages, setting, view, signals, inline or {}, max_parallel, grace, rollback
        )
        # Links to checkpoints that were taken are nothing anybody would miss.
        taken = {stage.name for stage in stages if stage.kind == "import"}
        rollback.wanted = False
        try:
            outcome = runner.run()
        except (UserError, OSError):
            rollback.wanted = taken.issuperset(runner.outcome.finished)
            raise
        rollback.wanted = outcome.code == 2 and taken.issuperset(outcome.finished)
        return outcome


def in_order(stages: tuple[Stage, ...]) -> list[Stage]:
    """The order in which stages that can start are started: checkpoints that are taken first (they
    are soon looked at, and may be wrong), then whatever has the most work before it until the end
    of the run. So a long baseline beside short experts begins with the first of them, instead of
    keeping everything waiting after the last."""
    behind: dict[str, float] = {}
    for stage in reversed(stages):
        after = [behind[other.name] for other in stages if stage.name in other.needs]
        behind[stage.name] = stage.work + max(after, default=0.0)
    return sorted(stages, key=lambda stage: (stage.kind != "import", -behind[stage.name]))


class _Runner:
    """The loop: start what can start, see what has ended, forward the stop signal."""

    def __init__(
        self,
        stages: tuple[Stage, ...],
        setting: RunSetting,
        view: ProgressView,
        signals: _Signals,
        inline: Mapping[str, Callable[[], object]],
        max_parallel: int | None,
        grace: float,
        rollback: Rollback,
    ) -> None:
        self.stages, self.setting, self.view, self.signals = stages, setting, view, signals
        self.inline, self.grace, self.rollback = inline, grace, rollback
        self.max_parallel = max_parallel or len(stages)
        self.cores, self.gpus = cores(), gpus()
        left = state.left(setting.run_dir, stages)
        self.waiting = in_order(left)
        self.jobs: list[StageJob] = []
        self.outcome = Outcome()

    def run(self) -> Outcome:
        try:
            while self.jobs or (self.waiting and not self._ending):
                for job in list(self.jobs):
                    self._look_at(job)
                if self._ending:
                    self._wind_up()
                elif not self._start_next():
                    time.sleep(0.1)
                    self.view.update(self.jobs)
        finally:  # an error of ours must not leave ranks behind
            for job in self.jobs:
                job.kill()
        if self.signals.count and not self.outcome.problem:
            self.outcome.code = EXIT_INTERRUPTED
        return self.outcome

    @property
    def _ending(self) -> bool:
        return bool(self.signals.count or self.outcome.code)

    def _wind_up(self) -> None:
        asked = [job for job in self.jobs if not job.stopping]
        for job in self.jobs:  # before a line is printed: the terminal may be gone
            job.stop(self.grace)
            if self.signals.count > 1:
                job.kill()
        for job in asked:
            self.view.note(f"{job.stage.name}: saving (Ctrl-C again: stop at once)")
        time.sleep(0.1)
        self.view.update(self.jobs)

    def _start_next(self) -> bool:
        """Start the first waiting stage whose needs are done and for which there is room."""
        unfinished = {stage.name for stage in self.waiting} | {j.stage.name for j in self.jobs}
        taking = any(job.stage.kind == "import" for job in self.jobs)
        for stage in self.waiting:
            if unfinished.intersection(stage.needs):
                continue
            if taking and stage.kind != "import":
                continue  # seconds; should that checkpoint be damaged, nothing else has been made
            if stage.kind in self.inline:
                self.waiting.remove(stage)
                self._call(stage)
                return True
            if self._room(stage):
                self.waiting.remove(stage)
                self._start(stage)
                return True
        return False

    def _room(self, stage: Stage) -> bool:
        if not self.jobs:
            return True  # one that is too large for this machine still runs, alone
        if len(self.jobs) >= self.max_parallel:
            return False
        if self.gpus and stage.world_size > len(self._free_gpus()):
            return False
        return sum(job.stage.cores for job in self.jobs) + stage.cores <= self.cores

    def _free_gpus(self) -> list[str]:
        taken = {gpu for job in self.jobs for gpu in job.gpus}
        return [gpu for gpu in self.gpus if gpu not in taken]

    def _start(self, stage: Stage) -> None:
        run_dir = self.setting.run_dir
        aside = state.claim(run_dir, stage)
        if aside is not None:
            self.rollback.set_aside[run_dir / stage.directory] = aside
            self.view.note(
                f"{stage.name}: its part of the recipe has changed; the former one is kept in "
                f"{aside} (delete it if it is not wanted)"
            )
        if state.done(run_dir, stage) is not None:
            self.view.note(f"{stage.name}: taken back from {run_dir / 'old'}")
            self.outcome.finished.append(stage.name)
            return
        locks.wait_until_idle(run_dir / stage.directory)
        job = StageJob(stage, self.setting, self._free_gpus()[: stage.world_size])
        self.jobs.append(job)
        self.view.begin(job)

    def _call(self, stage: Stage) -> None:
        run_dir = self.setting.run_dir
        state.claim(run_dir, stage)
        directory = run_dir / stage.directory
        state.begin(directory, state.next_attempt(directory), 1)
        self.inline[stage.kind]()
        state.finish(directory, stage, {})
        self.outcome.finished.append(stage.name)

    def _look_at(self, job: StageJob) -> None:
        verdict = job.poll()
        if verdict is None:
            return
        self.jobs.remove(job)
        if verdict == "stopped" and not (self.signals.count or self.outcome.code):
            self.outcome.code = EXIT_INTERRUPTED  # its ranks got a signal that this process did not
        self.view.end(job, verdict)
        if verdict == "done":
            self.outcome.finished.append(job.stage.name)
        elif verdict == "stopped":
            self.outcome.stopped.append(job.stage.name)
        elif not self.outcome.problem:
            message, user = job.message()
            self.outcome.code = 2 if user else 1
            self.outcome.problem = message if user else _report(job, message)


def _report(job: StageJob, message: str) -> str:
    lines = "\n".join(f"  | {line}" for line in job.last_lines())
    return (
        f"{job.stage.name} failed (attempt {job.attempt}): {message}\n"
        f"the end of {job.log}:\n{lines}"
    )


class _Signals:
    """Counts stop signals (Ctrl-C, SIGTERM, a closed terminal) instead of ending the process."""

    def __init__(self) -> None:
        self.count = 0
        self._former: dict[int, object] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: object) -> None:
        self.count += 1


def cores() -> int:
    """CPU cores this process may use, a container's limit included."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(count or 1, int(quota) // int(period)))
    return count or 1


def most_ranks() -> int:
    """Ranks that may be started on this machine where there are no GPUs: four a core, and sixteen
    on any (each holds some 400 MB before it has a model)."""
    return max(16, 4 * cores())


def gpus() -> list[str]:
    """The GPUs this process may use, without asking CUDA: numbers, or names of GPUs or of their
    parts (``GPU-...``, ``MIG-...``) as CUDA_VISIBLE_DEVICES has them, to the first that is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        each = (part.strip() for part in visible.split(","))
        found = list(itertools.takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, each))
        # Of the parts of GPUs a process sees the first alone.
        return found[:1] if found and found[0].startswith("MIG-") else found
    return [str(number) for number in sorted(_devices())]


def _devices() -> Iterator[int]:
    for entry in Path("/dev").glob("nvidia[0-9]*"):
        yield int(entry.name.removeprefix("nvidia"))
