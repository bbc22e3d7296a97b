"""What a run has left on the disk, read into one value for the page. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.evaluate.results import Matrix, Results
from megatron_btx.pipeline import graph, state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.recipe import stages
from megatron_btx.recipe.schema import Recipe
from megatron_btx.train import metrics
from megatron_btx.train.goodput import read_attempts
from megatron_btx.train.summary import Summary


@dataclass(frozen=True, kw_only=True, slots=True)
class StageData:
    """One stage as it went."""

    stage: Stage
    done: Mapping[str, Any] | None
    """Its ``done.json``, if it is finished for this recipe."""
    total_steps: int = 0
    train: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """Records of ``metrics.jsonl``, one a step."""
    evals: Sequence[Mapping[str, Any]] = field(default_factory=list)
    flops: float = 0.0
    """Training FLOPs so far."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Of the stage so far (train/summary.py)."""
    slow_ranks: Mapping[str, float] = field(default_factory=dict)
    """At the last look (train/slow_ranks.py)."""

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return int(self.train[-1].get("tokens", 0)) if self.train else 0

    @property
    def steps(self) -> int:
        """Steps trained so far."""
        return int(self.train[-1]["step"]) if self.train else 0

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the steps."""
        speeds = sorted(r["tokens_per_second"] for r in self.train if r.get("tokens_per_second"))
        return float(speeds[len(speeds) // 2]) if speeds else None

    def tokens_at(self, step: int) -> float:
        """Tokens after ``step`` steps."""
        return self.tokens * step / self.steps if self.steps else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingData:
    """The router's last measured work on held-out text."""

    experts: list[str]
    load: dict[str, Matrix]
    """Domain -> share of the tokens' choices, rows sum to one."""
    gate: dict[str, Matrix]
    """Domain -> mean gate weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """All of a run."""

    recipe: Recipe
    run_dir: Path
    results: Results | None
    stages: list[StageData]
    routing: RoutingData | None

    @property
    def by_name(self) -> dict[str, StageData]:
        """Stages by their names."""
        return {facts.stage.name: facts for facts in self.stages}


def gather(recipe: Recipe, run_dir: Path, graph_stages: Sequence[Stage] | None = None) -> RunData:
    """Read a run, finished or not.

    Args:
        recipe: the run's.
        run_dir: its directory.
        graph_stages: of its graph; ``None``: its input is hashed for them.

    Raises:
        UserError: a record of it is damaged.
    """
    known = graph.of_run(recipe, run_dir) if graph_stages is None else graph_stages
    stages = [_stage(recipe, run_dir, stage) for stage in known]
    results = results_of(run_dir, known)
    return RunData(
        recipe=recipe,
        run_dir=run_dir,
        results=results,
        stages=stages,
        routing=_routing(recipe, stages, results),
    )


def results_of(run_dir: Path, stages: Sequence[Stage]) -> Results | None:
    """A run's, if they were measured for the recipe of these stages, not for another one or for
    this one before it was changed."""
    measured = [stage for stage in stages if stage.kind == "evaluate"]
    done = all(state.done(run_dir, stage) is not None for stage in measured)
    return Results.read(run_dir) if done else None


def _stage(recipe: Recipe, run_dir: Path, stage: Stage) -> StageData:
    log = run_dir / stage.directory / "metrics.jsonl"
    records = metrics.read(log)
    train = [record for record in records if record.get("kind") == "train"]
    for record in train:
        if lacking := {"loss", "tokens", "time"} - record.keys():
            what = f"the record of step {record['step']} has no {' and no '.join(sorted(lacking))}"
            raise UserError(str(log), what, "remove that line")
    done = state.done(run_dir, stage)
    attempts, summary = read_attempts(run_dir / stage.directory), Summary(records)
    starts = [record for record in records if record.get("kind") == "start"]
    total = int(starts[-1].get("total_steps", 0)) if starts else 0
    return StageData(
        stage=stage,
        done=done,
        numbers=summary.values(attempts, done.get("finished") if done else None),
        slow_ranks=summary.slow_ranks,
        total_steps=total,
        train=train,
        evals=[record for record in records if record.get("kind") == "eval"],
        flops=_flops(recipe, stage, train[-1]["step"] / total if train and total else 0.0),
    )


def _flops(recipe: Recipe, stage: Stage, share: float) -> float:
    """The recipe's arithmetic, for the share of a stage's steps that is done."""
    if stage.kind not in graph.TRAINED:
        return 0.0
    return stages.flops(recipe, stage.name) * share


def _routing(
    recipe: Recipe, stages: list[StageData], results: Results | None
) -> RoutingData | None:
    """As the final evaluation measured it; before that, as the last one during training did."""
    for system in results.systems.values() if results is not None else ():
        if system.load:
            return RoutingData(
                experts=list(system.experts or recipe.expert_names),
                load=dict(system.load),
                gate=dict(system.gate),
            )
    for facts in reversed(stages):
        for record in reversed(facts.evals):
            if record.get("load"):
                return RoutingData(
                    experts=list(recipe.expert_names),
                    load=dict(record["load"]),
                    gate=dict(record.get("gate") or {}),
                )
    return None
