"""``report.html``: one self-contained page about a run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from megatron_btx.evaluate import routing_stats
from megatron_btx.evaluate.results import MEAN, Results
from megatron_btx.files import written
from megatron_btx.pipeline import stage_tables, state
from megatron_btx.pipeline.graph import TRAINED, Stage
from megatron_btx.recipe import epochs
from megatron_btx.recipe.load import dump
from megatron_btx.recipe.messages import amount, clock
from megatron_btx.recipe.schema import Recipe
from megatron_btx.report import html, run_figures, table
from megatron_btx.report.html import Cell
from megatron_btx.report.model_card import complete_export
from megatron_btx.report.run_data import RunData, StageData, gather
from megatron_btx.train.summary import slow_in_words

_COUNTED = ("documents", "tokens", "bytes")
REFRESH = 30
"""Seconds after which the page of a run on its way loads itself again."""


def write(recipe: Recipe, run_dir: Path, stages: Sequence[Stage] | None = None) -> Path:
    """Write ``report.html`` from what the run has left so far, and the exported model's card;
    returns the page's path.

    Args:
        recipe: the run's.
        run_dir: its directory.
        stages: of its graph, where they are known: else its input is hashed for them.

    Raises:
        UserError: a record of the run is damaged.
    """
    facts = gather(recipe, run_dir, stages)
    page, path = render(facts), run_dir / "report.html"
    exported = facts.by_name.get("export")
    if exported is not None and exported.done is not None:
        complete_export(recipe, run_dir, exported.done)
    with written(path) as file:
        file.write(page)
    return path


def render(facts: RunData) -> str:
    """The page."""
    made = [stage for stage in facts.stages if stage.stage.kind != "report"]
    # Not those without a record: text that was removed when all was done is not made again.
    left = state.left(facts.run_dir, tuple(stage.stage for stage in made))
    unfinished = [stage.name for stage in left]
    exported = facts.by_name.get("export")
    outputs = ((exported.done if exported else None) or {}).get("outputs", {})
    return html.render(
        "report.html",
        name=facts.recipe.name,
        system=_TITLES[facts.recipe.system],
        made_how=_made_how(facts.recipe),
        unfinished=unfinished,
        refresh=REFRESH if unfinished else None,
        now=time.strftime("%Y-%m-%d %H:%M:%S"),
        results=None if facts.results is None else _results(facts, facts.results),
        compute=run_figures.compute(facts),
        losses=run_figures.losses(facts),
        legend=run_figures.loss_legend(facts),
        routing=_routing(facts),
        stages={"head": _STAGES, "rows": [("", _stage_cells(stage)) for stage in made]},
        numbers=_numbers(made),
        slow=[f"{s.stage.name}: {slow_in_words(s.slow_ranks)}" for s in made if s.slow_ranks],
        use=_use(facts),
        exported=outputs.get("loss"),
        data=_data(facts),
        lineage=list(_lineage(facts)),
        keys=[(stage.stage.name, stage.stage.key) for stage in facts.stages],
        recipe=dump(facts.recipe),
        seeds_tokenizer=facts.recipe.seed.from_ and facts.recipe.tokenizer.path is None,
    )


_TITLES = table.TITLES | {"seed": "the seed", "experts": "experts alone", "dense": "dense baseline"}


def _made_how(recipe: Recipe) -> str:
    """The system in one sentence."""
    experts = f"{recipe.num_moe_experts} experts ({', '.join(recipe.expert_names)})"
    branched = "One seed, branched into domain experts that train on their own"
    return {
        "seed": "The seed, before anything is branched off.",
        "experts": f"{branched}.",
        "dense": "One seed, trained on with all the text that the experts and the finetuning read.",
        "upcycling": f"One seed, its feed-forward layers copied to {experts}, and trained on.",
        "btm": f"{branched}, and answer together.",
        "btx": f"{branched}, mixed into one mixture of {experts}, finetuned.",
    }[recipe.system]


def _results(facts: RunData, results: Results) -> dict[str, Any]:
    """What the page says of the final evaluation."""
    best = table.best(results)
    head = [(name, _mean(name)) for name in ("system", *results.columns)]
    head += [(name, "") for name in ("tokens", "FLOPs", "parameters", "active")]
    rows = []
    for row in table.rows(results):
        cells: list[Cell] = [(table.title(row.name), "")]
        for name in results.columns:
            style = "score best" if row.name in best[name] else "score"
            text = f"{row.loss[name]:.3f}" if name in row.loss else "–"
            cells.append((text, f"{style} {_mean(name)}".strip()))
        numbers = (row.train_tokens, row.train_flops, row.params_total, row.params_active)
        cells += [(_amount(number), "") for number in numbers]
        rows.append(("btx" if row.name == "btx" else "", cells))
    return {
        "verdict": table.verdict(results),
        "notes": table.notes(results),
        "tiles": list(_tiles(facts, results)),
        "head": head,
        "rows": rows,
    }


def _tiles(facts: RunData, results: Results) -> Iterable[tuple[str, str]]:
    systems = results.systems
    for name in table.TITLES:
        if name in systems and MEAN in systems[name].loss:
            yield f"{systems[name].loss[MEAN]:.3f}", f"{table.title(name)}, mean loss"
    mixed = systems.get("btx") or systems.get("upcycling")
    if mixed is not None and mixed.params_total and mixed.params_active:
        active, total = amount(mixed.params_active), amount(mixed.params_total)
        yield total, f"parameters of the mixture, {active} active"
    seconds = sum((stage.done or {}).get("seconds", 0.0) for stage in facts.stages)
    if seconds:
        yield clock(seconds), "time over all stages"


def _routing(facts: RunData) -> dict[str, Any] | None:
    if facts.routing is None:
        return None
    groups: list[tuple[str, list[tuple[str, Markup]]]] = run_figures.routing(facts, facts.routing)
    return {"words": " ".join(run_figures.routing_words(facts.routing)), "groups": groups}


_STAGES: list[Cell] = [
    *(("stage", ""), ("state", "left"), ("ranks × threads", ""), ("attempts", ""), ("steps", "")),
    *(("tokens", ""), ("FLOPs", ""), ("tokens/s", ""), ("time", "")),
]


def _stage_cells(facts: StageData) -> list[Cell]:
    stage, done = facts.stage, facts.done or {}
    state = "done" if facts.done else "in progress" if facts.train else "not yet"
    if stage.kind == "import" and facts.done:
        state = "taken"
    return [
        (stage.name, ""),
        (state, "left"),
        (f"{stage.world_size} × {stage.num_threads}", ""),
        (str(done.get("attempts", "–")), ""),
        (f"{facts.steps:,}" if facts.steps else "–", ""),
        *((_amount(number or None), "") for number in (facts.tokens, facts.flops)),
        (_amount(facts.tokens_per_second), ""),
        (clock(done["seconds"]) if "seconds" in done else "–", ""),
    ]


def _numbers(made: Sequence[StageData]) -> list[dict[str, Any]]:
    """Speed of every stage that has logged it, and where its wall time went."""
    tables = stage_tables.tables({stage.stage.name: stage.numbers for stage in made})
    return [_plain(head, rows) for head, rows in tables]


def _plain(head: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {
        "head": [(name, "") for name in head],
        "rows": [("", [(cell, "") for cell in row]) for row in rows],
    }


def _use(facts: RunData) -> dict[str, Any] | None:
    """How evenly the experts are used, by domain and layer."""
    if facts.routing is None:
        return None
    return _plain(*stage_tables.experts(routing_stats.by_layer(facts.routing.load)))


def _data(facts: RunData) -> dict[str, Any] | None:
    """What there is of every domain, and what of it is read."""
    prepare = facts.by_name["prepare"].done
    domains = (prepare or {}).get("outputs", {}).get("domains")
    if not domains:
        return None
    names = ["domain", *(f"{of}{what}" for of in ("", "held-out ") for what in _COUNTED)]
    rows = []
    for name, parts in domains.items():
        counted = [parts[part].get(what) for part in ("train", "valid") for what in _COUNTED]
        cells = [("–" if number is None else f"{number:,}", "") for number in counted]
        rows.append(("", [(name, ""), *cells]))
    return {"head": [(name, "") for name in names], "rows": rows, **_reading(facts, domains)}


def _reading(facts: RunData, domains: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens and epochs of each domain in each stage."""
    trained = [stage.stage.name for stage in facts.stages if stage.stage.kind in TRAINED]
    read = epochs.reading(facts.recipe, trained, domains)
    rows = []
    for one in read:
        times = "–" if one.epochs is None else f"{one.epochs:.2f}"
        cells = [(one.stage, ""), (one.domain, "left"), (f"{one.tokens:,}", ""), (times, "")]
        rows.append(("", cells))
    head = [("stage", ""), ("domain", "left"), ("tokens read", ""), ("epochs", "")]
    return {"read_head": head, "read_rows": rows, "warnings": epochs.warnings(read)}


def _lineage(facts: RunData) -> Iterable[tuple[str, str]]:
    records = [stage.done for stage in facts.stages if stage.done]
    yield "run directory", str(facts.run_dir)
    if records:
        finished = max(record.get("finished", 0.0) for record in records)
        yield "finished", time.strftime("%Y-%m-%d %H:%M", time.localtime(finished))
        revisions = _several(record.get("code_revision") for record in records)
        yield "code revision", revisions or "an installed package"
        versions: dict[str, list[Any]] = {}
        for record in records:
            for name, version in record.get("versions", {}).items():
                versions.setdefault(name, []).append(version)
        for name, found in versions.items():
            yield name, _several(found)
    yield "random seed", str(facts.recipe.random_seed)


def _several(values: Iterable[Any]) -> str:
    """Distinct values, in the order in which they were met."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value))


def _mean(name: str) -> str:
    return "mean" if name == MEAN else ""


def _amount(number: float | None) -> str:
    """Three digits that matter; FLOPs and the like in powers of ten."""
    if number is None:
        return "–"
    return f"{number:.2e}".replace("e+", "e") if number >= 1e12 else amount(number)
