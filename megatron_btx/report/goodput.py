"""Where a stage's wall time went, over all its attempts. Imports no torch.

Goodput is the share of the wall time, from the first attempt's start to the end, in which steps
were trained that the model has kept. The rest went to intervals that tile it:

- ``start``: from an attempt's start to its first step or evaluation (imports, model, checkpoint);
- ``evaluation`` and ``save``, as the log has timed them;
- ``lost``: from the last step that is kept to the last sign of an attempt that was killed;
- ``queue``: from the end of an attempt to the start of the next;
- ``other``: what is between (logging, replicas' checks, the end of the process).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Record = Mapping[str, Any]

KINDS = ("productive", "start", "evaluation", "save", "lost", "queue", "other")

_SECONDS = {
    "train": ("productive", "time_metrics/end_to_end(s)"),
    "eval": ("evaluation", "time_metrics/evaluation(s)"),
    "save": ("save", "train/checkpoint_save_duration_s"),
}


@dataclass(frozen=True, slots=True)
class Interval:
    """A piece of the wall time."""

    kind: str
    """Of ``KINDS``."""
    begin: float
    """Seconds since the epoch."""
    end: float


def intervals(
    attempts: Sequence[Record], records: Sequence[Record], end: float | None = None
) -> list[Interval]:
    """The wall time of a stage, piece by piece, without gaps or overlaps.

    Args:
        attempts: of ``attempts.jsonl``: ``time``, and of all but the first ``former_ended``.
        records: of ``metrics.jsonl``: what the stage has kept, each with its ``time``.
        end: of the stage; ``None``: its last record.
    """
    if not attempts:
        return []
    starts = [float(attempt["time"]) for attempt in attempts]
    timed = sorted(
        ((float(r["time"]), r) for r in records if "time" in r), key=lambda item: item[0]
    )
    last = end if end is not None else max([starts[-1], *(time for time, _ in timed)])
    found: list[Interval] = []
    for place, (begin, until) in enumerate(pairwise([*starts, last])):
        ended = until
        if place + 1 < len(attempts):
            ended = min(until, max(begin, float(attempts[place + 1].get("former_ended", until))))
        own = [(time, record) for time, record in timed if begin <= time <= until]
        found += _attempt(begin, ended, own, killed=place + 1 < len(attempts))
        found.append(Interval("queue", ended, until))
    return [piece for piece in found if piece.end > piece.begin]


def _attempt(
    begin: float, ended: float, records: Sequence[tuple[float, Record]], *, killed: bool
) -> list[Interval]:
    """Of one attempt; what came after its last kept step is lost, if it was killed."""
    found: list[Interval] = []
    at, gap = begin, "start"
    for time, record in records:
        kind, key = _SECONDS.get(record["kind"], ("", ""))
        if not kind or time > ended or not isinstance(record.get(key), int | float):
            continue
        first = min(max(at, time - float(record[key])), time)
        found += [Interval(gap, at, first), Interval(kind, first, time)]
        at, gap = max(at, time), "other"
    if killed and gap == "other":
        gap = "lost"
    return [*found, Interval(gap, at, ended)]


def seconds(pieces: Sequence[Interval]) -> dict[str, float]:
    """Seconds by kind; their sum is the wall time."""
    return {
        kind: sum(piece.end - piece.begin for piece in pieces if piece.kind == kind)
        for kind in KINDS
    }


def goodput(spent: Mapping[str, float]) -> float | None:
    """Productive over wall time; ``None`` of a stage that has not begun."""
    wall = sum(spent.values())
    return spent["productive"] / wall if wall else None
