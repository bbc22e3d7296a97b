"""The callbacks of training: metrics, held-out evaluation, replica checks, checkpoints.

Their order matters: an evaluation is logged before the checkpoint that follows it, so that
a run going on from a checkpoint has logged all up to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_btx.engine import checkpoint, checkpoint_directory
from megatron_btx.engine.async_save import AsyncSave
from megatron_btx.engine.checkpoint import TrainingState
from megatron_btx.engine.distributed import is_first_rank
from megatron_btx.engine.initializer import initialize
from megatron_btx.engine.model import DTYPES
from megatron_btx.evaluate import routing_stats
from megatron_btx.evaluate.heldout_loss import evaluate
from megatron_btx.mix.average import mean_of
from megatron_btx.recipe.schema import Precision, Training
from megatron_btx.train import throughput
from megatron_btx.train.goodput import read_attempts
from megatron_btx.train.lineage import Artifact
from megatron_btx.train.loop import Callback, Run
from megatron_btx.train.metrics import MetricsLog, read
from megatron_btx.train.replicas import check_replicas
from megatron_btx.train.step import Batch
from megatron_btx.train.summary import Summary
from megatron_btx.train.tracking import Tracker
from megatron_btx.weights.megatron import open_megatron


class Log(Callback):
    """``metrics.jsonl`` and W&B; the first rank writes."""

    def __init__(
        self,
        path: Path,
        tracker: Tracker,
        resumed_step: int,
        made: Callable[[], Artifact] | None = None,
    ) -> None:
        self.metrics, self.tracker, self.made = MetricsLog(path, resumed_step), tracker, made
        self.summary = Summary(read(path, strict=False))
        self.attempts = read_attempts(path.parent)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One record to both."""
        record = self.metrics.write(kind, step, **values)
        self.summary.add(record)
        self.tracker.log(record)

    def summarise(self, step: int) -> None:
        """What the stage comes to so far."""
        self.write("summary", step, self.summary.values(self.attempts))

    def sync(self) -> None:
        """What is logged is on the disk when this returns: a checkpoint must not outlive it."""
        self.metrics.sync()

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        """Log the step."""
        self.write("train", run.step, record)

    def at_end(self, run: Run) -> None:
        """Close both."""
        self.summarise(run.step)
        if self.made is not None and run.step == run.total_steps:
            self.tracker.make(self.made)
        self.metrics.close()
        self.tracker.close()


class HeldOutLoss(Callback):
    """The loss of every domain, and an MoE's load: before the first step (what a branch or a mix
    starts from), every so many steps, and after the last one."""

    def __init__(
        self, domains: Mapping[str, Sequence[Batch]], training: Training, log: Log | None
    ) -> None:
        self.domains, self.training, self.log = domains, training, log

    def at_start(self, run: Run) -> None:
        """Evaluate."""
        self._evaluate(run)

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        """Evaluate where it is time to."""
        interval = self.training.eval_interval
        if run.step == run.total_steps or (interval and run.step % interval == 0):
            self._evaluate(run)

    def _evaluate(self, run: Run) -> None:
        started = time.perf_counter()
        result = evaluate(
            run.model, self.domains, micro_batch_size=run.micro_batch_size, step=run.step
        )
        if self.log is not None:
            values = {key: value for key, value in asdict(result).items() if value is not None}
            if result.load is not None:
                values |= routing_stats.of_load(result.load)
                values["moe"] = routing_stats.by_layer(result.load)
            values["time_metrics/evaluation(s)"] = time.perf_counter() - started
            self.log.write("eval", run.step, values)


class CheckReplicas(Callback):
    """Stop a run whose replicated parameters drift apart, before it is saved."""

    def __init__(self, training: Training) -> None:
        self.interval = training.check_replicas_interval

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        """Compare, where it is time to."""
        if not self.interval:
            return
        if run.step == run.total_steps or run.stopped or run.step % self.interval == 0:
            check_replicas(run.model, run.step)


class AverageLast(Callback):
    """Behind the last step the model becomes the mean of the stage's last checkpoints, summed in
    fp64 and rounded once, before it is evaluated and saved.

    Args:
        directory: of the checkpoints.
        steps: whose mean it is, the last one among them.
        precision: of the weights.
        manifest: of the last step's own.
        saving: what writes the others, perhaps still.
    """

    def __init__(
        self,
        directory: Path,
        steps: Sequence[int],
        precision: Precision,
        manifest: Callable[[Run], dict[str, Any]],
        saving: Checkpoints,
    ) -> None:
        self.directory, self.steps, self.precision = directory, steps, precision
        self.manifest, self.saving = manifest, saving

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        """Average where it was the last."""
        if run.step != run.total_steps or len(self.steps) == 1:
            return
        self.saving.finish()
        last = checkpoint_directory.last_step_directory(self.directory, run.step)
        manifest = {**self.manifest(run), "has_optimizer": False}
        checkpoint.save(last, TrainingState(model=run.model), manifest)
        places = [
            checkpoint_directory.step_directory(self.directory, step) for step in self.steps[:-1]
        ]
        checkpoint_directory.wait_until_seen(last)
        models = [open_megatron(place, place.name) for place in (*places, last)]
        initialize(run.model, mean_of(models, DTYPES[self.precision]))
        run.averaged = tuple(self.steps)


class Checkpoints(Callback):
    """A whole checkpoint every so many steps, when stopped, and at the end; what a killed run had
    half written or half deleted goes first.

    The last one is what later stages start from: weights only, since an optimizer is fresh in every
    stage. With ``async_save`` those before it are written while training goes on.
    """

    def __init__(
        self,
        directory: Path,
        training: Training,
        manifest: Callable[[Run], dict[str, Any]],
        add_tokenizer: Callable[[Path], None],
        log: Log | None,
        spared: Collection[int] = (),
    ) -> None:
        self.directory, self.training, self.log, self.spared = directory, training, log, spared
        self.manifest, self.add_tokenizer = manifest, add_tokenizer
        self._writing: tuple[AsyncSave, int, float] | None = None
        """A checkpoint on its way, its step, and seconds that training has waited for it."""
        if is_first_rank():
            checkpoint_directory.sweep(directory)

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        """Save where it is time to, then drop what is older than the recipe keeps."""
        ends = run.step == run.total_steps or run.stopped
        due = ends or run.step % self.training.save_interval == 0
        self._look(wait=due)
        if not due:
            return
        if self.log is not None:
            self.log.sync()
        started = time.perf_counter()
        target = checkpoint_directory.step_directory(self.directory, run.step)
        if self.training.async_save and not ends:
            writing = AsyncSave(target, *self._content(run), self.add_tokenizer, self._prune)
            seconds = time.perf_counter() - started
            self._writing = writing, run.step, seconds
            if self.log is not None:
                self.log.write("saving", run.step, {"time_metrics/checkpoint_begin(s)": seconds})
            return
        checkpoint.save(target, *self._content(run), self.add_tokenizer)
        seconds = time.perf_counter() - started
        values = throughput.of_checkpoint("save", target, seconds)
        self._saved(run.step, values)
        if is_first_rank() and run.step == run.total_steps:
            checkpoint_directory.prune(self.directory, 1)
            checkpoint_directory.sweep(self.directory)
        elif is_first_rank():
            self._prune()

    def _content(self, run: Run) -> tuple[TrainingState, dict[str, Any]]:
        """What is saved, and the manifest that says so."""
        last = run.step == run.total_steps
        state = (
            TrainingState(model=run.model)
            if last
            else TrainingState(model=run.model, optimizer=run.optimizer, schedule=run.schedule)
        )
        manifest = {**self.manifest(run), "has_optimizer": not last}
        if run.averaged:
            manifest["averaged"] = list(run.averaged)
        return state, manifest

    def finish(self) -> None:
        """Wait for what is on its way."""
        self._look(wait=True)

    def _look(self, *, wait: bool) -> None:
        """Whether what is on its way has become a whole checkpoint."""
        if self._writing is None:
            return
        writing, step, stalled = self._writing
        started = time.perf_counter()
        done = writing.finished(wait=wait)
        now = time.perf_counter()
        stalled += now - started
        self._writing = None if done else (writing, step, stalled)
        if done:
            values = throughput.of_checkpoint("save", writing.directory, now - writing.begun)
            values["train/checkpoint_save_stall_s"] = stalled
            values["time_metrics/checkpoint_end(s)"] = now - started
            self._saved(step, values)

    def _prune(self) -> None:
        """Delete what is older than the recipe keeps."""
        keep = self.training.keep_checkpoints
        checkpoint_directory.prune(self.directory, keep, self.spared)

    def _saved(self, step: int, values: dict[str, float]) -> None:
        if self.log is not None:
            self.log.write("save", step, values)
            self.log.summarise(step)
