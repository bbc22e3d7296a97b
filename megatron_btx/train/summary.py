"""The numbers of a stage so far, from its own log. Imports no torch.

One computation, several views: ``metrics.jsonl`` and W&B get it with every checkpoint and at the
end (records of kind ``summary``), ``btx status`` and the report page make it from the log as it is.
Names are those of the records (docs/metrics.md).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megatron_btx.errors import shown
from megatron_btx.evaluate.routing_stats import percentile
from megatron_btx.train import goodput
from megatron_btx.train.goodput import STEP, Sign

P50, P95 = "time_metrics/end_to_end_p50(s)", "time_metrics/end_to_end_p95(s)"

_SUMS: dict[str, Callable[[Sequence[float]], float]] = {
    "throughput/": statistics.median,
    "time_metrics/": statistics.median,
    "train/checkpoint_": statistics.median,
    "memory/": max,
    "moe/": lambda values: values[-1],
}
"""Beginning of a name -> what its values come to: speeds and times their median, memory its peak,
the router's load that of the last evaluation."""


class Summary:
    """A running summary of a stage's records, which keeps a few numbers a step."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._seen: dict[str, list[float]] = {}
        self._signs: list[Sign] = []
        self.experts: Mapping[str, Any] = {}
        """Of the last evaluation of an MoE: by domain, for each layer, how evenly its experts are
        used (``routing_stats.by_layer``)."""
        self.slow_ranks: Mapping[str, float] = {}
        """At the last look, by ``RANK@HOST`` how many times as long as the median rank it works."""
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a record of ``metrics.jsonl``."""
        if record["kind"] == "summary":
            return
        if (sign := goodput.sign(record)) is not None:
            self._signs.append(sign)
        self.experts = record.get("moe") or self.experts
        self.slow_ranks = record.get("slow_ranks", self.slow_ranks)
        for name, value in record.items():
            if name.startswith(tuple(_SUMS)) and isinstance(value, int | float):
                self._seen.setdefault(name, []).append(float(value))

    def values(
        self, attempts: Sequence[Mapping[str, Any]], end: float | None = None
    ) -> dict[str, float]:
        """The numbers, by name; those of which nothing is logged are left out.

        Args:
            attempts: the stage's (:func:`goodput.read_attempts`).
            end: when the stage ended, seconds since the epoch; ``None``: with its last record.
        """
        found: dict[str, float] = {}
        for name, values in self._seen.items():
            if name == STEP:
                ordered = sorted(values)
                found |= {P50: percentile(ordered, 0.5), P95: percentile(ordered, 0.95)}
            else:
                how = next(how for begin, how in _SUMS.items() if name.startswith(begin))
                found[name] = how(values)
        if STEP in self._seen:
            found |= self._wall(attempts, end)
        return found

    def _wall(self, attempts: Sequence[Mapping[str, Any]], end: float | None) -> dict[str, float]:
        """Goodput, and the seconds of each kind."""
        spent = goodput.seconds(goodput.intervals(attempts, self._signs, end))
        share = goodput.goodput(spent)
        if share is None:
            return {}
        seconds = {f"goodput/{kind}(s)": value for kind, value in spent.items()}
        return {"goodput/share": share, "goodput/wall(s)": sum(spent.values()), **seconds}


def slow_in_words(slow: Mapping[str, float]) -> str:
    """``rank 3 on n2 works 2.1 times as long as the median rank``; empty where none is slow."""
    said = []
    for name, ratio in slow.items():
        rank, _, host = name.partition("@")
        who = f"rank {shown(rank)} on {shown(host)}"
        said.append(f"{who} works {ratio:.1f} times as long as the median rank")
    return "; ".join(said)
