"""The final table: held-out loss of every system on every domain; and the tables that ``btx
evaluate`` prints."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from megatron_btx.evaluate.results import MEAN, Results, SystemResult
from megatron_btx.evaluate.routing_stats import choice_in_words
from megatron_btx.pipeline.stage_tables import columns
from megatron_btx.recipe.messages import aligned, amount

TITLES = {
    "seed": "seed",
    "dense": "dense baseline",
    "upcycling": "sparse upcycling",
    "btm": "Branch-Train-Merge",
    "btx": "Branch-Train-MiX",
}
"""How systems are called; an expert is «math expert»."""


def title(name: str) -> str:
    """A system's name for people."""
    if name.startswith("expert:"):
        return f"{name.removeprefix('expert:')} expert"
    return TITLES.get(name, name)


def rows(results: Results) -> list[SystemResult]:
    """The systems: the seed, the experts, whatever else there is, the dense baseline, BTX."""
    experts = [f"expert:{name}" for name in results.columns]
    first, last = ["seed", *experts], ["dense", "upcycling", "btm", "btx"]

    def place(system: SystemResult) -> int:
        name = system.name
        if name in first:
            return first.index(name)
        return len(first) + (1 + last.index(name) if name in last else 0)

    return sorted(results.systems.values(), key=place)


def best(results: Results) -> dict[str, set[str]]:
    """Column -> the systems with the lowest loss in it, to the three digits that are printed."""
    found = {}
    for column in results.columns:
        losses = {
            row.name: round(row.loss[column], 3) for row in rows(results) if column in row.loss
        }
        found[column] = {name for name, loss in losses.items() if loss == min(losses.values())}
    return found


LEVEL = 0.005
"""Nats per token; a smaller gap says nothing. Twice the standard deviation of the demo's gap in
five runs on text that other versions of packages had changed a little: -0.001 to 0.005."""


def verdict(results: Results) -> str:
    """BTX against the dense baseline in words, whichever is ahead; empty if either is missing."""
    systems = results.systems
    if "btx" not in systems or "dense" not in systems:
        return ""
    btx, dense = systems["btx"].loss, systems["dense"].loss
    if MEAN not in btx or MEAN not in dense:
        return ""
    gap = btx[MEAN] - dense[MEAN]
    names = [name for name in results.domains if name in dense and name in btx]
    ahead = [name for name in names if btx[name] < dense[name]]
    if abs(gap) < LEVEL:
        text = (
            f"Branch-Train-MiX and the dense baseline are level: their mean held-out losses are "
            f"{abs(gap):.3f} nats per token apart"
        )
    elif gap < 0:
        text = (
            f"Branch-Train-MiX is ahead of the dense baseline: its mean held-out loss is "
            f"{-gap:.3f} nats per token lower"
        )
    else:
        text = (
            f"The dense baseline is ahead of Branch-Train-MiX: its mean held-out loss is "
            f"{gap:.3f} nats per token lower"
        )
    where = ", ".join(ahead) if ahead else "no domain"
    if len(ahead) == len(names) and len(names) > 1:
        where = "every domain"
    text += f". Branch-Train-MiX has the lower loss on {where}."
    return text + _cost(systems["btx"], systems["dense"])


def _cost(btx: SystemResult, dense: SystemResult) -> str:
    """At what training compute; nothing where it is not known."""
    if not btx.train_flops or not dense.train_flops:
        return ""
    ratio = btx.train_flops / dense.train_flops
    text = f" It took {ratio:.2f} times the dense baseline's training compute"
    ours, theirs = btx.train_tokens, dense.train_tokens
    if ours is None or theirs is None:
        return f"{text}."
    if ours == theirs:
        return f"{text}, on the same number of tokens."
    return f"{text}, on {amount(ours)} tokens, the dense baseline on {amount(theirs)}."


SHORT = 10_000
"""Tokens of held-out text. Losses of single tokens have a standard deviation of 2 to 3 nats, so the
mean of fewer is uncertain by some hundredths."""


def notes(results: Results) -> list[str]:
    """What must be known to read the table."""
    lines = [
        f"{title(system.name)}: {choice_in_words(system.expert_choice)}."
        for system in results.systems.values()
        if system.expert_choice
    ]
    if taken := unknown(results.systems.values()):
        lines.append(untold(taken))
    tokens = {name: text.get("tokens") for name, text in results.text.items()}
    short = [f"{name} {n:,}" for name, n in tokens.items() if n is not None and n < SHORT]
    if short:
        lines.append(
            f"Held-out text is short: {', '.join(short)} tokens. Differences of a few hundredths "
            "may be chance."
        )
    return lines


def untold(taken: Iterable[str]) -> str:
    """Why numbers are missing."""
    *names, last = map(title, taken)
    several = f"{', '.join(names)} and {last} do" if names else f"{last} does"
    it = "they were" if names else "it was"
    return (
        f"What was taken as {several} not say how many tokens {it} trained on: tokens and FLOPs of "
        f"what was made of {'them' if names else 'it'} are not known."
    )


def unknown(systems: Iterable[SystemResult]) -> list[str]:
    """Stages whose model was taken from a checkpoint that does not say how it was trained."""
    stages = (item for system in systems for item in system.stages.items())
    return list(dict.fromkeys(name for name, cost in stages if cost.tokens is None))


def show(results: Results, stream: IO[str] | None = None) -> None:
    """Print the table: with colours on a terminal, as plain text elsewhere."""
    stream = stream or sys.stdout
    if stream.isatty():
        _rich(results, stream)
    else:
        stream.write(plain(results))
    for line in (verdict(results), *notes(results)):
        if line:
            stream.write(line + "\n")


def plain(results: Results) -> str:
    """The table as aligned text; ``*`` marks the best of a column."""
    names, marks = results.columns, best(results)
    table = [["held-out loss (nats/token)", *names]]
    for row in rows(results):
        cells = [
            f"{row.loss[name]:.3f}{'*' if row.name in marks[name] else ' '}"
            if name in row.loss
            else "- "
            for name in names
        ]
        table.append([title(row.name), *cells])
    table[0][1:] = [f"{name} " for name in names]
    return "\n".join(aligned(table)) + "\n* best of its column\n"


def _rich(results: Results, stream: IO[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    marks = best(results)
    table = Table(title="Held-out loss, nats per token", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("system")
    for name in results.columns:
        table.add_column(
            escape(name), justify="right", header_style="bold" if name == "mean" else ""
        )
    for row in rows(results):
        cells = []
        for name in results.columns:
            text = f"{row.loss[name]:.3f}" if name in row.loss else "-"
            good = row.name in marks[name]
            cells.append(f"[bold green]{text}*[/]" if good else f"{text} ")
        name = escape(title(row.name))
        table.add_row(f"[bold]{name}[/]" if row.name == "btx" else name, *cells)
    table.caption = "* best of its column"
    Console(file=stream, highlight=False).print(table)


def data_table(result: Mapping[str, Any]) -> str:
    """Nats per token, then bits per byte."""
    names = list(next(iter(result.values()))["data"])
    parts = []
    for key, title in (("nats_per_token", "nats/token"), ("bits_per_byte", "bits/byte")):
        rows = []
        for checkpoint, found in result.items():
            values = [found["data"][name][key] for name in names]
            rows.append([checkpoint, *(f"{v:.4f}" for v in (*values, sum(values) / len(values)))])
        parts.append(columns([title, *names, "mean"], rows))
    sets = {name: found["weights"] for name, found in result.items() if "weights" in found}
    for checkpoint, weights in sets.items():
        models = list(next(iter(weights.values())))
        rows = [[n, *(f"{weights[n][m]:.0%}" for m in models)] for n in names]
        parts.append(columns([f"{checkpoint}: weights", *models], rows))
    return "\n".join(parts) + _choices(result)


def _choices(result: Mapping[str, Any]) -> str:
    """How each checkpoint of Sample Top-1 was evaluated."""
    chosen = {name: found["expert_choice"] for name, found in result.items()
              if "expert_choice" in found}  # fmt: skip
    return "".join(f"{name}: {choice_in_words(choice)}\n" for name, choice in chosen.items())


def _percent(score: float, stderr: float | None) -> str:
    return f"{100 * score:.1f}" + ("" if stderr is None else f" ±{100 * stderr:.1f}")


def _answer_bits(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """Bits per byte of the right answers, of the tasks that have it; empty if none has."""
    rows = []
    for checkpoint, found in result.items():
        bits = [found["tasks"][name]["metrics"].get("bits_per_byte") for name in names]
        known = [one for one in bits if one is not None]
        if known:
            cells = ["-" if one is None else f"{one:.3f}" for one in bits]
            rows.append([checkpoint, *cells, f"{sum(known) / len(known):.3f}"])
    return "\n" + columns(["answers' bits/byte", *names, "average"], rows) if rows else ""


def tasks_table(result: Mapping[str, Any]) -> str:
    """A row a checkpoint, a column a task, and their mean, as in the paper's tables."""
    names = list(next(iter(result.values()))["tasks"])
    rows = []
    for checkpoint, found in result.items():
        scores = [found["tasks"][name] for name in names]
        cells = [_percent(one["score"], one["stderr"]) for one in scores]
        rows.append([checkpoint, *cells, f"{100 * found['average']:.1f}"])
    one = next(iter(result.values()))["tasks"]
    said = "; ".join(
        f"{name}: {one[name]['metric']}, {one[name]['shots']} shots, {one[name]['items']} items"
        for name in names
    )
    text = columns(["score (%)", *names, "average"], rows) + said + "\n"
    text += _answer_bits(result, names)
    return text + "".join(_cut(result, name) for name in names) + _choices(result)


def _cut(result: Mapping[str, Any], task: str) -> str:
    """How many of a task's contexts were too long; models of one tokenizer have one line."""
    models: dict[int, list[str]] = {}
    for checkpoint, found in result.items():
        models.setdefault(found["tasks"][task]["cut"], []).append(checkpoint)
    lines = []
    for number, those in models.items():
        whose = "" if len(models) == 1 else f" ({', '.join(those)})"
        lost = f"{number} contexts were longer than the model's and lost their beginning"
        lines += [f"{task}{whose}: {lost}\n"] if number else []
    return "".join(lines)
