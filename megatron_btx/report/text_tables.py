"""Tables of ``btx evaluate`` as plain text. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_btx.evaluate.sample_top1_mode import in_words


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
    return "".join(f"{name}: {in_words(choice)}\n" for name, choice in chosen.items())


def _percent(score: float, stderr: float | None) -> str:
    return f"{100 * score:.1f}" + ("" if stderr is None else f" ±{100 * stderr:.1f}")


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
    for checkpoint, found in result.items():
        for name, entry in found["tasks"].items():
            if entry["cut"]:
                text += (
                    f"{checkpoint}, {name}: {entry['cut']} contexts were longer than the model's "
                    "and lost their beginning\n"
                )
    return text + _choices(result)


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"
