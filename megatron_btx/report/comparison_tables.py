"""A comparison as text, Markdown and JSON. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_btx.evaluate.results import MEAN
from megatron_btx.evaluate.routing_stats import choice_in_words
from megatron_btx.files import json_text
from megatron_btx.recipe.messages import aligned, amount, clock
from megatron_btx.recipe.stages import expert_stage
from megatron_btx.report.comparison import LEAST_GAIN, Comparison, System
from megatron_btx.report.paired_differences import Paired
from megatron_btx.report.table import untold

UNKNOWN = "?"
"""In the place of a number that is not known."""

HEAD = ("train tokens", "train FLOPs", "in the MoE", "time", "parameters", "active", "FLOPs/token")
"""Columns behind the scores: the last is a forward pass's, at inference."""


def cells(comparison: Comparison) -> list[list[str]]:
    """The table's rows as text: the name, the scores, and what ``HEAD`` names."""
    return [
        [
            system.name,
            *(shown(comparison, system, column) for column in comparison.columns),
            _amount(system.result.train_tokens),
            told_flops(system.result.train_flops),
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
    """``1.234`` or ``1.234 ± 0.005``, with ``*`` if it is the best of its column and ``~`` if
    its difference from that may well be chance."""
    text = f"{system.loss[column]:.3f}"
    if column in system.spread:
        text += f" ± {system.spread[column]:.3f}"
    if comparison.best[column] == system.name:
        return text + "*"
    return text + ("~" if comparison.tied(system, column) else "")


def notes(comparison: Comparison) -> list[str]:
    """What the marks mean."""
    lines = [
        "Held-out loss in nats per token, lower is better; * the best of its column. Tokens, FLOPs "
        "and time are of all stages that made a system after the seed (the seed's row: its own); "
        "time is that of the training steps alone, times their ranks."
    ]
    seeds = max(len(system.losses) for system in comparison.systems)
    if seeds > 1:
        lines.append(
            f"Mean ± sample standard deviation over {seeds} random seeds, of the time the least; "
            "~ the 95% interval of the paired difference from the best holds 0 (Student's t)."
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


Table = tuple[str, list[list[str]]]
"""What it shows, and its rows, the first of them its head."""


def differences(comparison: Comparison, against: str) -> Table:
    """Every other system less ``against``, paired by random seed."""
    other = comparison.named(against)
    rows = [["system", *comparison.columns, "95% of the mean's", "seeds"]]
    for system in comparison.systems:
        found = [comparison.difference(system, other, column) for column in comparison.columns]
        known = [one for one in found if one is not None]
        if system.name != against and known:
            count = str(len(known[-1].values))
            rows.append([system.name, *map(signed, known), _interval(known[-1]), count])
    what = (
        f"Loss less {against}'s under the same random seed, negative is better: mean ± sample "
        "standard deviation of the differences; ~ their 95% interval (Student's t) holds 0"
    )
    return what, rows


def signed(difference: Paired) -> str:
    """``-0.012 ± 0.003``, with ``~`` if it may well be chance."""
    text = f"{difference.mean:+.3f}"
    if difference.stdev is not None:
        text += f" ± {difference.stdev:.3f}"
    return text + ("~" if difference.open else "")


def _interval(difference: Paired) -> str:
    if difference.interval is None:
        return "-"
    low, high = difference.interval
    return f"{low:+.3f} to {high:+.3f}"


def retention(comparison: Comparison) -> Table | None:
    """What each system keeps of what each domain's expert gained; ``None`` without experts."""
    domains = [c for c in comparison.columns if comparison.retained(comparison.systems[0], c)]
    if not domains:
        return None
    rows = [["system", *domains]]
    for system in comparison.systems:
        if system.name != "seed":
            kept = [comparison.retained(system, domain) for domain in domains]
            rows.append([system.name, *map(_kept, kept)])
    known = {system.name for system in comparison.systems}
    without = [c for c in comparison.columns if expert_stage(c) in known and c not in domains]
    what = (
        "Retention: of the loss that a domain's expert gained over the seed on its own domain, the "
        "share that a system keeps, (seed - system) / (seed - expert), mean over the random seeds; "
        "in brackets the nats per token that it is behind the expert"
    )
    if without:
        what += f"; not of {', '.join(without)}, whose expert gained less than {LEAST_GAIN} nats"
    return what, rows


def _kept(found: tuple[Paired, Paired] | None) -> str:
    if found is None:
        return "-"
    share, behind = found
    spread = f" ± {share.stdev:.0%}" if share.stdev is not None else ""
    return f"{round(100 * share.mean)}%{spread} ({behind.mean:+.3f})"


def tables(comparison: Comparison, against: Sequence[str]) -> list[Table]:
    """Those below the scores: differences from each of ``against`` (of several random seeds from
    the best mean, where none is given), and retention."""
    several = max(len(system.losses) for system in comparison.systems) > 1
    names = list(against) or [comparison.best[MEAN]] * several
    below = [differences(comparison, name) for name in names if len(comparison.systems) > 1]
    kept = retention(comparison)
    return below if kept is None else [*below, kept]


def markdown(comparison: Comparison, against: Sequence[str] = ()) -> str:
    """The scores, the tables below them, and the FLOPs by stage."""
    text = markdown_table([["system", *comparison.columns, *HEAD], *cells(comparison)])
    text += "\n" + "\n".join(notes(comparison)) + "\n"
    for what, rows in tables(comparison, against):
        text += f"\n{what}:\n\n{markdown_table(rows)}"
    return text + f"\nTraining FLOPs by stage:\n\n{markdown_table(_by_stage(comparison))}"


def _by_stage(comparison: Comparison) -> list[list[str]]:
    each = [(system.name, system.train_flops_by_stage) for system in comparison.systems]
    stages = list(dict.fromkeys(stage for _, costs in each for stage in costs))
    rows = [
        [name, *(told_flops(costs[stage]) if stage in costs else "" for stage in stages)]
        for name, costs in each
    ]
    return [["system", *stages], *rows]


def _amount(number: int | None) -> str:
    return UNKNOWN if number is None else amount(number)


def told_flops(number: int | None) -> str:
    """``1.23e+20``."""
    return UNKNOWN if number is None else f"{number:.3g}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head."""
    lines = [rows[0], ["---", *("---:" for _ in rows[0][1:])], *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned text; the first row is the head."""
    return "\n".join(aligned(rows)) + "\n"


def plain(comparison: Comparison, against: Sequence[str] = ()) -> str:
    """The scores and the tables below them as aligned text."""
    text = plain_table([["system", *comparison.columns, *HEAD], *cells(comparison)])
    text += "\n".join(notes(comparison)) + "\n"
    for what, rows in tables(comparison, against):
        text += f"\n{what}:\n{plain_table(rows)}"
    return text


def as_json(
    comparison: Comparison, against: Sequence[str] = (), tasks: Mapping[str, Any] | None = None
) -> str:
    """:func:`content`, a system a line; with ``tasks``, scores by system."""
    told = content(comparison, against) | ({"tasks": dict(tasks)} if tasks else {})
    return json_lines(told, 2) + "\n"


def content(comparison: Comparison, against: Sequence[str] = ()) -> dict[str, Any]:
    """All of it for other programs, unrounded: ``losses`` by random seed, from which every other
    score can be computed."""
    names = list(dict.fromkeys([comparison.best[MEAN], *against]))
    return {
        "columns": comparison.columns,
        "best": dict(comparison.best),
        "systems": {system.name: _system(comparison, system) for system in comparison.systems},
        "differences": {name: _differences(comparison, name) for name in names},
        "retention": {
            system.name: {
                domain: {"share": _paired(found[0]), "behind": _paired(found[1])}
                for domain in comparison.columns
                if (found := comparison.retained(system, domain)) is not None
            }
            for system in comparison.systems
        },
    }


def _system(comparison: Comparison, system: System) -> dict[str, Any]:
    result = system.result
    return {
        "system": system.system,
        "loss": system.loss,
        "spread": {column: system.spread.get(column) for column in comparison.columns},
        "tied_with_best": [c for c in comparison.columns if comparison.tied(system, c)],
        "runs": len(system.losses),
        "losses": {str(seed): dict(loss) for seed, loss in system.losses.items()},
        "train_tokens": result.train_tokens,
        "train_flops": result.train_flops,
        "train_flops_by_stage": dict(system.train_flops_by_stage),
        "moe_share": result.moe_share,
        "train_seconds": system.train_seconds,
        "train_seconds_by_seed": {str(seed): s for seed, s in system.seconds.items()},
        "params_total": result.params_total,
        "params_active": result.params_active,
        "inference_flops_per_token": result.inference_flops_per_token,
        "expert_choice": result.expert_choice,
    }


def _differences(comparison: Comparison, against: str) -> dict[str, Any]:
    other = comparison.named(against)
    return {
        system.name: {
            column: _paired(found)
            for column in comparison.columns
            if (found := comparison.difference(system, other, column)) is not None
        }
        for system in comparison.systems
        if system.name != against
    }


def _paired(found: Paired) -> dict[str, Any]:
    interval = found.interval and list(found.interval)
    return {"mean": found.mean, "stdev": found.stdev, "interval": interval, "n": len(found.values)}


def json_lines(value: Any, depth: int) -> str:
    """JSON with a line for each key of the outer ``depth`` mappings."""
    if depth == 0 or not isinstance(value, dict) or not value:
        return json_text(value)
    lines = [f"{json_text(key)}: {json_lines(part, depth - 1)}" for key, part in value.items()]
    return "{\n" + ",\n".join(lines) + "\n}"
