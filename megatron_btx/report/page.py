"""``report.html``: one page about a run, readable without a network for as long as HTML is."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_btx.files import written
from megatron_btx.pipeline.local.progress import amount, clock
from megatron_btx.recipe.load import dump
from megatron_btx.recipe.schema import Recipe
from megatron_btx.report import charts, table
from megatron_btx.report.run_data import Facts, StageFacts, gather
from megatron_btx.report.style import sheet

_COUNTED = ("documents", "tokens")


def write(recipe: Recipe, run_dir: Path) -> Path:
    """Write ``report.html`` from what the run has left so far; returns its path."""
    page = render(gather(recipe, run_dir))
    path = run_dir / "report.html"
    with written(path) as file:
        file.write(page)
    return path


def render(facts: Facts) -> str:
    """The page."""
    name = html.escape(facts.recipe.name)
    sections = [
        _head(facts),
        _results(facts),
        _compute(facts),
        _losses(facts),
        _routing(facts),
        _stages(facts),
        _data(facts),
        _lineage(facts),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name} · Branch-Train-MiX</title><style>{sheet()}</style></head>\n"
        f"<body><main>\n{''.join(sections)}"
        "<footer>Losses are in nats per token on held-out text. FLOPs are those of the matrix "
        "products of the model, three times the forward pass; recomputation is not counted."
        "</footer>\n</main></body></html>\n"
    )


def _head(facts: Facts) -> str:
    name = html.escape(facts.recipe.name)
    text = f"<h1>{name}: {_TITLES[facts.recipe.system]}</h1>"
    text += f'<p class="soft">{html.escape(_made_how(facts.recipe))}</p>'
    unfinished = [s.stage.name for s in facts.stages if not s.done and s.stage.kind != "report"]
    if unfinished:
        text += f'<p class="verdict">Not finished yet: {html.escape(", ".join(unfinished))}.</p>'
    if facts.results is None:
        return text
    words = table.verdict(facts.results)
    if words:
        text += f'<p class="verdict">{html.escape(words)}</p>'
    return text + f'<div class="tiles">{"".join(_tiles(facts))}</div>'


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


def _tiles(facts: Facts) -> Iterable[str]:
    rows = {row.name: row for row in table.rows(facts.results or {"systems": {}})}
    for name in table.TITLES:
        if name in rows and "mean" in rows[name].loss:
            yield _tile(f"{rows[name].loss['mean']:.3f}", f"{rows[name].title}, mean loss")
    mixed = rows.get("btx") or rows.get("upcycling")
    if mixed is not None and mixed.params_total and mixed.params_active:
        active, total = amount(mixed.params_active), amount(mixed.params_total)
        yield _tile(total, f"parameters of the mixture, {active} active")
    seconds = sum((stage.done or {}).get("seconds", 0.0) for stage in facts.stages)
    if seconds:
        yield _tile(clock(seconds), "time over all stages")


def _tile(value: str, label: str) -> str:
    return (
        f'<div class="card tile"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
    )


def _results(facts: Facts) -> str:
    if facts.results is None:
        return ""
    columns, best = table.columns(facts.results), table.best(facts.results)
    head = "".join(_cell("th", name, _mean(name)) for name in ["system", *columns])
    head += "".join(_cell("th", name) for name in ("tokens", "FLOPs", "parameters", "active"))
    body = ""
    for row in table.rows(facts.results):
        cells = _cell("th", row.title)
        for name in columns:
            style = "score best" if row.name in best[name] else "score"
            text = f"{row.loss[name]:.3f}" if name in row.loss else "–"
            cells += _cell("td", text, f"{style} {_mean(name)}".strip())
        numbers = (row.train_tokens, row.train_flops, row.params_total, row.params_active)
        cells += "".join(_cell("td", _amount(number)) for number in numbers)
        body += f'<tr class="{"btx" if row.name == "btx" else ""}">{cells}</tr>'
    return (
        "<h2>Held-out loss</h2>"
        '<p class="soft">Nats per token, lower is better; ★ is the best of its column. Tokens and '
        "FLOPs count everything that made a system after the seed; the seed's row counts its own."
        f"{html.escape(''.join(f' {note}' for note in table.notes(facts.results)))}</p>"
        + _table(head, body)
    )


def _compute(facts: Facts) -> str:
    picture = charts.compute(facts)
    if picture is None:
        return ""
    return (
        "<h2>Score against training compute</h2>"
        f'<figure class="card wide">{picture}'
        "<figcaption>Large dots: the final evaluation. Small dots: evaluations during training, on "
        "less text. The experts and the dense baseline branch off the seed; Branch-Train-MiX "
        "begins where the compute of all its experts ends."
        "</figcaption></figure>"
    )


def _losses(facts: Facts) -> str:
    panels = [
        f'<figure class="card"><h3>{html.escape(name)}</h3>{picture}</figure>'
        for name, picture in charts.losses(facts)
    ]
    if not panels:
        return ""
    return (
        "<h2>Losses of every stage</h2>"
        '<p class="soft">All stages but the seed share one scale.</p>'
        f'{charts.loss_legend(facts)}<div class="panels">{"".join(panels)}</div>'
    )


def _routing(facts: Facts) -> str:
    if facts.routing is None:
        return ""
    said = html.escape(" ".join(charts.routing_words(facts.routing)))
    text = f"<h2>Where the router sends tokens</h2><p>{said}</p>"
    for label, pictures in charts.routing(facts, facts.routing):
        panels = "".join(
            f'<figure class="card"><h3>{html.escape(domain)}</h3>{picture}</figure>'
            for domain, picture in pictures
        )
        text += f'<p class="note">{label} per layer and expert, on held-out text of each domain</p>'
        text += f'<div class="panels small">{panels}</div>'
    return text


def _stages(facts: Facts) -> str:
    names = ("ranks × threads", "attempts", "steps", "tokens", "FLOPs", "tokens/s", "time")
    head = _cell("th", "stage") + _cell("th", "state", "left")
    head += "".join(_cell("th", name) for name in names)
    made = [stage for stage in facts.stages if stage.stage.kind != "report"]
    body = "".join(f"<tr>{_stage_cells(stage)}</tr>" for stage in made)
    return f"<h2>Stages</h2>{_table(head, body)}{_export(facts)}"


def _export(facts: Facts) -> str:
    """What the comparison of the exported model with ``transformers`` said."""
    stage = facts.by_name.get("export")
    loss = ((stage.done if stage else None) or {}).get("outputs", {}).get("loss")
    if not loss:
        return ""
    return (
        f'<p class="note">The mixture, exported as a Hugging Face model, has a loss of '
        f"{loss['transformers']:.6f} in transformers and {loss['megatron']:.6f} here: a difference "
        f"of {abs(loss['difference']):.1e} nats per token.</p>"
    )


def _data(facts: Facts) -> str:
    prepare = facts.by_name["prepare"].done
    domains = (prepare or {}).get("outputs", {}).get("domains")
    if not domains:
        return ""
    names = ("documents", "tokens", "held-out documents", "held-out tokens")
    head = "".join(_cell("th", name) for name in ("domain", *names))
    body = ""
    for name, parts in domains.items():
        numbers = [parts[part][what] for part in ("train", "valid") for what in _COUNTED]
        body += f"<tr>{_cell('th', name)}{''.join(_cell('td', f'{n:,}') for n in numbers)}</tr>"
    return f"<h2>Data</h2>{_table(head, body)}"


def _stage_cells(facts: StageFacts) -> str:
    stage, done = facts.stage, facts.done or {}
    state = "done" if facts.done else "in progress" if facts.train else "not yet"
    if stage.kind == "import" and facts.done:
        state = "taken"
    cells = [_cell("th", stage.name), _cell("td", state, "left")]
    cells.append(_cell("td", f"{stage.world_size} × {stage.num_threads}"))
    cells.append(_cell("td", str(done.get("attempts", "–"))))
    cells.append(_cell("td", f"{facts.steps:,}" if facts.steps else "–"))
    cells += [_cell("td", _amount(number or None)) for number in (facts.tokens, facts.flops)]
    cells.append(_cell("td", _amount(facts.tokens_per_second)))
    cells.append(_cell("td", clock(done["seconds"]) if "seconds" in done else "–"))
    return "".join(cells)


def _lineage(facts: Facts) -> str:
    records = [stage.done for stage in facts.stages if stage.done]
    rows = [("run directory", str(facts.run_dir))]
    if records:
        finished = max(record.get("finished", 0.0) for record in records)
        rows.append(("finished", time.strftime("%Y-%m-%d %H:%M", time.localtime(finished))))
        revisions = _several(record.get("code_revision") for record in records)
        rows.append(("code revision", revisions or "an installed package"))
        versions: dict[str, list[Any]] = {}
        for record in records:
            for name, version in record.get("versions", {}).items():
                versions.setdefault(name, []).append(version)
        rows += [(name, _several(found)) for name, found in versions.items()]
    rows.append(("random seed", str(facts.recipe.random_seed)))
    listed = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in rows)
    keys = "".join(
        f"<dt>{html.escape(stage.stage.name)}</dt><dd>{stage.stage.key}</dd>"
        for stage in facts.stages
    )
    return (
        f'<h2>Recipe and lineage</h2><div class="card"><dl>{listed}</dl>'
        f"<details><summary>Content hashes of the stages</summary><dl>{keys}</dl></details>"
        "<details><summary>The recipe, with every default written out</summary>"
        f"<pre>{html.escape(dump(facts.recipe))}</pre></details></div>"
    )


def _several(values: Iterable[Any]) -> str:
    """Distinct values, in the order in which they were met."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value))


def _table(head: str, body: str) -> str:
    return (
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _mean(name: str) -> str:
    return "mean" if name == "mean" else ""


def _amount(number: float | None) -> str:
    """Three digits that matter; FLOPs and the like in powers of ten."""
    if number is None:
        return "–"
    return f"{number:.2e}".replace("e+", "e") if number >= 1e12 else amount(number)


def _cell(tag: str, text: str, style: str = "") -> str:
    mark = f' class="{style}"' if style else ""
    return f"<{tag}{mark}>{html.escape(text)}</{tag}>"
