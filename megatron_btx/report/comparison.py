"""Several systems side by side: the paper's tables 2 and 3 for these runs. Imports no torch.

A row is a system, its score a held-out loss per domain (nats per token, lower is better) and their
mean; of several runs under other random seeds, the mean and the sample standard deviation of each.
Costs are those of ``recipe/count.py``: model FLOPs of all stages that made the system after the
seed (active parameters, attention, router, all experts that ran), in the seed's row its own.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.evaluate.results import Results, SystemResult, damaged
from megatron_btx.evaluate.routing_stats import choice_in_words
from megatron_btx.files import find_json
from megatron_btx.pipeline.local.progress import amount, clock
from megatron_btx.recipe.schema import Recipe
from megatron_btx.recipe.stages import directory
from megatron_btx.recipe.systems import SYSTEMS, rows
from megatron_btx.report.table import untold

UNKNOWN = "?"
"""In the place of a number that is not known."""


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
    """Its first run's; ``loss`` the mean over the runs."""
    spread: Mapping[str, float]
    """By column the sample standard deviation over the runs; empty for a single one."""
    runs: int
    train_seconds: float | None
    """Measured, over all its stages, as if they had run one after the other; mean over the runs."""

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

    def tied(self, system: System, column: str) -> bool:
        """Whether a score differs from the best of its column by less than the spread of either:
        another random seed could have turned the two around."""
        best = self.best.get(column)
        if best is None or column not in system.result.loss or system.name == best:
            return False
        other = next(one for one in self.systems if one.name == best)
        spread = max(system.spread.get(column, 0.0), other.spread.get(column, 0.0))
        return system.result.loss[column] - other.result.loss[column] < spread


def compare(runs: Sequence[FinishedRun]) -> Comparison:
    """What the runs' ``results.json`` say, side by side. What several of them hold (the seed, an
    expert) is one row.

    Raises:
        UserError: a run has no results, they are of other domains, or of other text.
    """
    found: dict[str, list[tuple[FinishedRun, SystemResult]]] = {}
    first: Results | None = None
    for run, named in zip(runs, titles(runs), strict=True):
        results = Results.read(run.run_dir)
        if results is None:
            raise UserError(str(run.run_dir), "has no results.json", "run its recipe first")
        first = first or results
        _check_same(run, results, runs[0], first)
        for name, row in results.systems.items():
            known = found.setdefault(named.get(name, name), [])
            if all(other.recipe.random_seed != run.recipe.random_seed for other, _ in known):
                known.append((run, row))
    assert first is not None
    columns = first.columns
    systems = tuple(
        sorted((_system(name, rows, columns) for name, rows in found.items()), key=_place)
    )
    best = {
        column: min(systems, key=lambda system: system.result.loss[column]).name
        for column in columns
    }
    return Comparison(columns=columns, systems=systems, best=best)


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
    name: str, found: Sequence[tuple[FinishedRun, SystemResult]], columns: Sequence[str]
) -> System:
    run, row = found[0]
    seconds = [_seconds(each.run_dir, row.stages) for each, row in found]
    known = [value for value in seconds if value is not None]
    losses = {column: [each.loss[column] for _, each in found] for column in columns}
    several = len(found) > 1
    return System(
        name=name,
        system=_kind(name, run.recipe),
        result=replace(row, loss={key: statistics.fmean(each) for key, each in losses.items()}),
        spread={key: statistics.stdev(each) for key, each in losses.items()} if several else {},
        runs=len(found),
        train_seconds=statistics.fmean(known) if known else None,
    )


def _kind(name: str, recipe: Recipe) -> str:
    """Which of the systems a row is of."""
    if name == "seed":
        return "seed"
    if "expert:" in name:
        return "experts"
    return "dense" if name == "dense" else recipe.system


def _place(system: System) -> int:
    """Rows of one kind keep their order."""
    return list(SYSTEMS).index(system.system)


def _seconds(run_dir: Path, stages: Iterable[str]) -> float | None:
    """What the stages' own records say; ``None`` where one of them says nothing."""
    total = 0.0
    for stage in stages:
        done = find_json(directory(run_dir, stage) / "done.json") or {}
        if "seconds" not in done:
            return None
        total += done["seconds"]
    return total


HEAD = ("train tokens", "train FLOPs", "in the MoE", "time", "parameters", "active", "FLOPs/token")
"""Columns behind the scores: the last is a forward pass's, at inference."""


def cells(comparison: Comparison) -> list[list[str]]:
    """The table's rows as text: the name, the scores, and what ``HEAD`` names."""
    return [
        [
            system.name,
            *(shown(comparison, system, column) for column in comparison.columns),
            _amount(system.result.train_tokens),
            _flops(system.result.train_flops),
            _share(system.result.moe_share),
            clock(system.train_seconds) if system.train_seconds is not None else "-",
            _amount(system.result.params_total),
            _amount(system.result.params_active),
            _amount(system.result.inference_flops_per_token),
        ]
        for system in comparison.systems
    ]


def _share(share: float | None) -> str:
    if share is None:
        return UNKNOWN
    return f"{share:.0%}" if share else "-"


def shown(comparison: Comparison, system: System, column: str) -> str:
    """``1.234`` or ``1.234 ± 0.005``, with ``*`` if it is the best of its column and ``~`` if it
    differs from it by less than the spread."""
    text = f"{system.result.loss[column]:.3f}"
    if column in system.spread:
        text += f" ± {system.spread[column]:.3f}"
    if comparison.best[column] == system.name:
        return text + "*"
    return text + ("~" if comparison.tied(system, column) else "")


def notes(comparison: Comparison) -> list[str]:
    """What the marks mean."""
    lines = [
        "Held-out loss in nats per token, lower is better; * the best of its column. Tokens, FLOPs "
        "and time are of all stages that made a system after the seed (the seed's row: its own)."
    ]
    runs = max(system.runs for system in comparison.systems)
    if runs > 1:
        lines.append(
            f"Mean ± sample standard deviation over {runs} random seeds; ~ differs from the best "
            "by less than the larger spread of the two."
        )
    chosen = [(system.name, system.result.expert_choice) for system in comparison.systems]
    lines += [
        f"{name}: {choice_in_words(choice)}." for name, choice in chosen if choice is not None
    ]
    costs = [system.train_flops_by_stage.items() for system in comparison.systems]
    taken = [stage for items in costs for stage, flops in items if flops is None]
    if taken:
        lines.append(f"{UNKNOWN}: {untold(dict.fromkeys(taken))}")
    return lines


def markdown(comparison: Comparison) -> str:
    """The table, and the FLOPs by stage below it."""
    head = ["system", *comparison.columns, *HEAD]
    text = _markdown_table(head, cells(comparison))
    text += "\n" + "\n".join(notes(comparison)) + "\n"
    stages = list(
        dict.fromkeys(name for s in comparison.systems for name in s.train_flops_by_stage)
    )
    table = [
        [
            s.name,
            *(
                _flops(s.train_flops_by_stage[stage]) if stage in s.train_flops_by_stage else "-"
                for stage in stages
            ),
        ]
        for s in comparison.systems
    ]
    return text + "\nTraining FLOPs by stage:\n\n" + _markdown_table(["system", *stages], table)


def _amount(number: int | None) -> str:
    return UNKNOWN if number is None else amount(number)


def _flops(number: int | None) -> str:
    return UNKNOWN if number is None else f"{number:.3g}"


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plain(comparison: Comparison) -> str:
    """The table as aligned text."""
    table = [["system", *comparison.columns, *HEAD], *cells(comparison)]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    return "\n".join([*lines, *notes(comparison)]) + "\n"


def as_json(comparison: Comparison, tasks: Mapping[str, Any] | None = None) -> str:
    """The same for other programs, numbers unrounded; with ``tasks``, scores by system."""
    systems = {
        system.name: {
            "system": system.system,
            "loss": {column: system.result.loss[column] for column in comparison.columns},
            "spread": {column: system.spread.get(column) for column in comparison.columns},
            "tied_with_best": [c for c in comparison.columns if comparison.tied(system, c)],
            "runs": system.runs,
            "train_tokens": system.result.train_tokens,
            "train_flops": system.result.train_flops,
            "train_flops_by_stage": dict(system.train_flops_by_stage),
            "moe_share": system.result.moe_share,
            "train_seconds": _finite(system.train_seconds),
            "params_total": system.result.params_total,
            "params_active": system.result.params_active,
            "inference_flops_per_token": system.result.inference_flops_per_token,
            "expert_choice": system.result.expert_choice,
        }
        for system in comparison.systems
    }
    content = {"columns": comparison.columns, "best": dict(comparison.best), "systems": systems}
    if tasks:
        content["tasks"] = dict(tasks)
    return json.dumps(content, indent=1) + "\n"


def _finite(number: float | None) -> float | None:
    return number if number is None or math.isfinite(number) else None
