"""Several systems side by side: the paper's tables 2 and 3 for these runs. Imports no torch.

A row is a system, its score a held-out loss per domain (nats per token, lower is better) and their
mean, under one or several random seeds. Costs are those of ``recipe/count.py``: model FLOPs of all
stages that made the system after the seed (active parameters, attention, router, all experts that
ran), in the seed's row its own.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.evaluate.results import Results, SystemResult, damaged
from megatron_btx.files import find_json
from megatron_btx.recipe.schema import Recipe
from megatron_btx.recipe.stages import directory, expert_stage
from megatron_btx.recipe.systems import SYSTEMS, rows
from megatron_btx.report.paired_differences import Paired
from megatron_btx.train import goodput, metrics

LEAST_GAIN = 0.01
"""Nats per token: shares of less than an expert gained so are noise."""

SecondsOfLog = Callable[[Path], float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRun:
    """A recipe that has been run, under one random seed."""

    recipe: Recipe
    run_dir: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """A row of the table."""

    name: str
    """``seed``, ``expert:math``, or the recipe's name."""
    system: str
    """``system:`` of its recipe."""
    result: SystemResult
    """Its first run's: what it is and costs is the same under every random seed."""
    losses: Mapping[int, Mapping[str, float]]
    """By random seed and column."""
    seconds: Mapping[int, float] = field(default_factory=dict)
    """Measured, by random seed, where all its stages say it: rank-seconds in training steps
    (:func:`goodput.rank_seconds`), of the stages that ``result.train_flops`` counts."""

    @property
    def loss(self) -> dict[str, float]:
        """By column the mean over the random seeds."""
        return {column: statistics.fmean(values) for column, values in self._columns().items()}

    @property
    def spread(self) -> dict[str, float]:
        """By column the sample standard deviation over the random seeds; empty of a single one."""
        if len(self.losses) < 2:
            return {}
        return {column: statistics.stdev(values) for column, values in self._columns().items()}

    def _columns(self) -> dict[str, list[float]]:
        each = list(self.losses.values())
        return {column: [loss[column] for loss in each] for column in each[0]}

    @property
    def train_seconds(self) -> float | None:
        """The least over the random seeds: what else a machine does makes times only longer."""
        return min(self.seconds.values(), default=None)

    @property
    def train_flops_by_stage(self) -> dict[str, int | None]:
        """``None`` of a model that was taken and does not say how it was trained."""
        return {stage: cost.flops for stage, cost in self.result.stages.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All systems, in the order of the paper's table 2."""

    columns: tuple[str, ...]
    """The domains, and ``mean``."""
    systems: tuple[System, ...]
    best: Mapping[str, str] = field(default_factory=dict)
    """Column -> the system with the lowest score."""

    def named(self, name: str) -> System:
        """A row.

        Raises:
            UserError: there is none of this name.
        """
        found = next((system for system in self.systems if system.name == name), None)
        if found is None:
            raise _no_such(name, [system.name for system in self.systems])
        return found

    def difference(self, system: System, other: System, column: str) -> Paired | None:
        """``system`` less ``other`` under each random seed that both were run with; negative where
        ``system`` is better. ``None`` if there is none."""
        both = [seed for seed in system.losses if seed in other.losses]
        values = [system.losses[seed][column] - other.losses[seed][column] for seed in both]
        return Paired(tuple(values)) if values else None

    def tied(self, system: System, column: str) -> bool:
        """Whether the difference from the best of its column may well be chance."""
        best = self.best[column]
        if system.name == best:
            return False
        found = self.difference(system, self.named(best), column)
        return found is not None and found.open

    def retained(self, system: System, domain: str) -> tuple[Paired, Paired] | None:
        """What a system keeps of the loss that the domain's expert gained over the seed on its own
        domain, under each random seed: the share (seed - system) / (seed - expert), and how far it
        is behind, system - expert, in nats per token. ``None`` where the domain has no expert, or
        that gained too little to take shares of.

        The expert is the row ``expert:DOMAIN`` for every system, so that shares of one domain
        compare: also for a system that has longer or anchored branches of its own.
        """
        by_name = {one.name: one for one in self.systems}
        seed, expert = by_name.get("seed"), by_name.get(expert_stage(domain))
        if seed is None or expert is None:
            return None
        gained = self.difference(seed, expert, domain)
        kept = self.difference(seed, system, domain)
        behind = self.difference(system, expert, domain)
        if gained is None or kept is None or behind is None or min(gained.values) < LEAST_GAIN:
            return None
        shares = [a / b for a, b in zip(kept.values, gained.values, strict=True)]
        return Paired(tuple(shares)), behind


def compare(runs: Sequence[FinishedRun]) -> Comparison:
    """What the runs' ``results.json`` say, side by side. What several of them hold (the seed, an
    expert) is one row.

    Raises:
        UserError: a run has no results, they are of other domains, or of other text.
    """
    found: dict[str, list[tuple[FinishedRun, SystemResult]]] = {}
    each = check_text(runs)
    for run, results, named in zip(runs, each, titles(runs), strict=True):
        for name, row in results.systems.items():
            known = found.setdefault(named.get(name, name), [])
            if all(other.recipe.random_seed != run.recipe.random_seed for other, _ in known):
                known.append((run, row))
    columns = each[0].columns
    of_log = functools.cache(_seconds_of_log)  # many systems share a stage
    made = (_system(name, rows, of_log) for name, rows in found.items())
    systems = tuple(sorted(made, key=_place))
    best = {column: min(systems, key=lambda system: system.loss[column]).name for column in columns}
    return Comparison(columns=columns, systems=systems, best=best)


def check_text(runs: Sequence[FinishedRun]) -> list[Results]:
    """What the runs' ``results.json`` say, whose losses are of the same text.

    Raises:
        UserError: a run has no results, they are of other domains, or of other text.
    """
    found: list[Results] = []
    for run in runs:
        results = Results.read(run.run_dir)
        if results is None:
            raise UserError(str(run.run_dir), "has no results.json", "run its recipe first")
        found.append(results)
        _check_same(run, results, runs[0], found[0])
    return found


def _check_same(run: FinishedRun, results: Results, first: FinishedRun, theirs: Results) -> None:
    """That the losses are of the first run's domains, and of its held-out text, token by token."""
    if results.columns != theirs.columns:
        here, there = ", ".join(results.columns), ", ".join(theirs.columns)
        what = f"was evaluated on {here}, the others on {there}"
        raise UserError(str(run.run_dir), what, "compare recipes with the same domains")
    for system in results.systems.values():
        if missing := [name for name in results.columns if name not in system.loss]:
            what = f"{system.name} has no loss of {missing[0]}"
            raise damaged(str(run.run_dir / "results.json"), what)
    if set(results.text) != set(results.domains):
        raise UserError(
            str(run.run_dir / "results.json"),
            "does not say which held-out text its losses are of (an earlier version wrote it)",
            f"evaluate again: remove {run.run_dir / 'evaluate'}, then btx run",
        )
    for name, text in results.text.items():
        if text != theirs.text[name]:
            what = (
                f"was evaluated on other text of {name} ({text['tokens']:,} tokens) than "
                f"{first.run_dir} ({theirs.text[name]['tokens']:,} tokens)"
            )
            fix = "give both the same domains, tokenizer, seq_length and evaluate.tokens"
            raise UserError(str(run.run_dir), what, fix)


def check_names(runs: Sequence[FinishedRun], names: Sequence[str]) -> None:
    """Before anything is run: that the comparison may have rows of these names.

    Raises:
        UserError: it cannot.
    """
    sure = list(dict.fromkeys(name for named in titles(runs) for name in named.values()))
    maybe = [f"{run.recipe.name} {row.name}" for run in runs for row in rows(run.recipe)]
    for name in names:
        if name not in (*sure, *maybe):
            raise _no_such(name, sure)


def _no_such(name: str, names: Sequence[str]) -> UserError:
    return UserError(f"--against {name}", "there is no such system", f"use {', '.join(names)}")


def titles(runs: Sequence[FinishedRun]) -> list[dict[str, str]]:
    """What each run's rows are called beside those of others. A system's own has the recipe's name.
    The seed and the experts are the same everywhere; an expert that was trained otherwise than in
    an earlier run (for longer, say) has its recipe's name too."""
    first: dict[tuple[str, int], Any] = {}
    found = []
    for run in runs:
        named = {}
        own = rows(run.recipe)[-1].name if run.recipe.system not in ("seed", "experts") else None
        for row in rows(run.recipe):
            record = find_json(directory(run.run_dir, row.models[0]) / "stage.json") or {}
            key = first.setdefault((row.name, run.recipe.random_seed), record.get("key"))
            same = key == record.get("key")
            named[row.name] = row.name if same else f"{run.recipe.name} {row.name}"
            if row.name == own:
                named[row.name] = run.recipe.name
        found.append(named)
    return found


def _system(
    name: str, found: Sequence[tuple[FinishedRun, SystemResult]], of_log: SecondsOfLog
) -> System:
    run, row = found[0]
    seconds = {run.recipe.random_seed: _seconds(run.run_dir, row, of_log) for run, row in found}
    return System(
        name=name,
        system=_kind(name, run.recipe),
        result=row,
        losses={run.recipe.random_seed: row.loss for run, row in found},
        seconds={seed: value for seed, value in seconds.items() if value is not None},
    )


def _kind(name: str, recipe: Recipe) -> str:
    """Which of the systems a row is of."""
    if "expert:" in name:
        return "experts"
    return name if name in ("seed", "dense") else recipe.system


def _place(system: System) -> int:
    """Rows of one kind keep their order."""
    return list(SYSTEMS).index(system.system)


def _seconds(run_dir: Path, row: SystemResult, of_log: SecondsOfLog) -> float | None:
    """Of all its stages; ``None`` where one of them says nothing."""
    total = 0.0
    for stage, cost in row.stages.items():
        log = (directory(run_dir, stage) / "metrics.jsonl").resolve()
        spent = 0.0 if cost.tokens == 0 else of_log(log)
        if spent is None:
            return None
        total += spent
    return total


def _seconds_of_log(log: Path) -> float | None:
    return goodput.rank_seconds(metrics.read(log))
