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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.evaluate.sample_top1_mode import in_words
from megatron_btx.files import find_json
from megatron_btx.pipeline.local.progress import amount, clock
from megatron_btx.recipe.schema import Recipe
from megatron_btx.recipe.stages import directory
from megatron_btx.recipe.systems import SYSTEMS, rows
from megatron_btx.report.table import untold

MEAN = "mean"
UNKNOWN = "?"
"""In the place of a number that nobody knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A recipe that has been run, under one random seed."""

    recipe: Recipe
    run_dir: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One cell of the table."""

    value: float
    """Mean over the runs, nats per token."""
    spread: float | None = None
    """Sample standard deviation over the runs; ``None`` for a single one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """A row of the table."""

    name: str
    """``seed``, ``expert:math``, or the recipe's name."""
    system: str
    """``system:`` of its recipe."""
    scores: Mapping[str, Score]
    """By column."""
    runs: int
    train_tokens: int | None
    """``None``, as FLOPs: a model that was taken does not say how it was trained."""
    train_flops: int | None
    train_flops_by_stage: Mapping[str, int | None]
    train_seconds: float | None
    """Measured, over all its stages, as if they had run one after the other; mean over the runs."""
    params_total: int
    params_active: int
    inference_flops_per_token: int
    expert_choice: str | None = None
    """Of Sample Top-1, how it was evaluated (evaluate/sample_top1_mode.py)."""

    @property
    def moe_share(self) -> float | None:
        """Share of the training FLOPs that is spent on a mixture of experts (table 3)."""
        if "finetune" not in self.train_flops_by_stage:
            return 0.0
        mixture = self.train_flops_by_stage["finetune"]
        if mixture is None or self.train_flops is None:
            return None
        return mixture / (self.train_flops or 1)


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
        score, best = system.scores.get(column), self.best.get(column)
        if score is None or best is None or system.name == best:
            return False
        other = next(s for s in self.systems if s.name == best).scores[column]
        spread = max(score.spread or 0.0, other.spread or 0.0)
        return score.value - other.value < spread


def compare(runs: Sequence[Run]) -> Comparison:
    """What the runs' ``results.json`` say, side by side. What several of them hold (the seed, an
    expert) is one row.

    Raises:
        UserError: a run has no results, they are of other domains, or of other text.
    """
    found: dict[str, list[tuple[Run, Mapping[str, Any]]]] = {}
    columns: tuple[str, ...] | None = None
    text: Mapping[str, Any] | None = None
    for run in runs:
        results = find_json(run.run_dir / "results.json")
        if results is None:
            raise UserError(str(run.run_dir), "has no results.json", "run its recipe first")
        text = text or results.get("text")
        here = (*results["domains"], MEAN)
        columns = columns or here
        if here != columns:
            what = f"was evaluated on {', '.join(here)}, the others on {', '.join(columns)}"
            raise UserError(str(run.run_dir), what, "compare recipes with the same domains")
        _check_text(run, results, runs[0], text)
        for name, row in results["systems"].items():
            known = found.setdefault(title(run.recipe, name), [])
            if all(other.recipe.random_seed != run.recipe.random_seed for other, _ in known):
                known.append((run, row))
    assert columns is not None
    systems = tuple(
        sorted((_system(name, rows, columns) for name, rows in found.items()), key=_place)
    )
    best = {
        column: min(systems, key=lambda system: system.scores[column].value).name
        for column in columns
    }
    return Comparison(columns=columns, systems=systems, best=best)


def _check_text(
    run: Run, results: Mapping[str, Any], first: Run, text: Mapping[str, Any] | None
) -> None:
    """That the losses are of the first run's held-out text, token by token."""
    own = results.get("text")
    if own is None:
        raise UserError(
            str(run.run_dir / "results.json"),
            "does not say which held-out text its losses are of (an earlier version wrote it)",
            f"evaluate again: remove {run.run_dir / 'evaluate'}, then btx run",
        )
    for name, its in own.items():
        theirs = (text or {})[name]
        if its != theirs:
            what = (
                f"was evaluated on other text of {name} ({its['tokens']:,} tokens) than "
                f"{first.run_dir} ({theirs['tokens']:,} tokens)"
            )
            fix = "give both the same domains, tokenizer, seq_length and evaluate.tokens"
            raise UserError(str(run.run_dir), what, fix)


def title(recipe: Recipe, row: str) -> str:
    """What a row of a recipe is called beside those of others: a system's own has the recipe's
    name, the seed and the experts are the same everywhere."""
    own = rows(recipe)[-1].name
    return recipe.name if row == own and recipe.system not in ("seed", "experts") else row


def _system(
    name: str, found: Sequence[tuple[Run, Mapping[str, Any]]], columns: Sequence[str]
) -> System:
    run, row = found[0]
    seconds = [_seconds(each.run_dir, row["stages"]) for each, row in found]
    known = [value for value in seconds if value is not None]
    return System(
        name=name,
        system=_kind(name, run.recipe),
        scores={column: _score([each["loss"][column] for _, each in found]) for column in columns},
        runs=len(found),
        train_tokens=row["train_tokens"],
        train_flops=row["train_flops"],
        train_flops_by_stage={stage: cost["flops"] for stage, cost in row["stages"].items()},
        train_seconds=statistics.fmean(known) if known else None,
        params_total=row["params_total"],
        params_active=row["params_active"],
        inference_flops_per_token=row["inference_flops_per_token"],
        expert_choice=row.get("expert_choice"),
    )


def _kind(name: str, recipe: Recipe) -> str:
    """Which of the systems a row is of."""
    if name == "seed":
        return "seed"
    if name.startswith("expert:"):
        return "experts"
    return "dense" if name == "dense" else recipe.system


def _place(system: System) -> int:
    """Rows of one kind keep their order."""
    return list(SYSTEMS).index(system.system)


def _score(values: Sequence[float]) -> Score:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Score(value=statistics.fmean(values), spread=spread)


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
            UNKNOWN if system.train_tokens is None else amount(system.train_tokens),
            _flops(system.train_flops),
            _share(system.moe_share),
            clock(system.train_seconds) if system.train_seconds is not None else "-",
            amount(system.params_total),
            amount(system.params_active),
            amount(system.inference_flops_per_token),
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
    score = system.scores[column]
    text = f"{score.value:.3f}"
    if score.spread is not None:
        text += f" ± {score.spread:.3f}"
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
    chosen = {s.name: s.expert_choice for s in comparison.systems if s.expert_choice is not None}
    lines += [f"{name}: {in_words(choice)}." for name, choice in chosen.items()]
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
            "loss": {column: score.value for column, score in system.scores.items()},
            "spread": {column: score.spread for column, score in system.scores.items()},
            "tied_with_best": [c for c in comparison.columns if comparison.tied(system, c)],
            "runs": system.runs,
            "train_tokens": system.train_tokens,
            "train_flops": system.train_flops,
            "train_flops_by_stage": dict(system.train_flops_by_stage),
            "moe_share": system.moe_share,
            "train_seconds": _finite(system.train_seconds),
            "params_total": system.params_total,
            "params_active": system.params_active,
            "inference_flops_per_token": system.inference_flops_per_token,
            "expert_choice": system.expert_choice,
        }
        for system in comparison.systems
    }
    content = {"columns": comparison.columns, "best": dict(comparison.best), "systems": systems}
    if tasks:
        content["tasks"] = dict(tasks)
    return json.dumps(content, indent=1) + "\n"


def _finite(number: float | None) -> float | None:
    return number if number is None or math.isfinite(number) else None
