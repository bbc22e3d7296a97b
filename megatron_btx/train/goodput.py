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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_btx.files import read_lines

Record = Mapping[str, Any]

KINDS = ("productive", "start", "evaluation", "save", "lost", "queue", "other")

STEP = "time_metrics/end_to_end(s)"
"""Seconds of a training step."""

_SECONDS: dict[str, tuple[str, ...]] = {
    "train": ("productive", STEP),
    "eval": ("evaluation", "time_metrics/evaluation(s)"),
    "saving": ("save", "time_metrics/checkpoint_begin(s)"),
    "save": ("save", "time_metrics/checkpoint_end(s)", "train/checkpoint_save_duration_s"),
}
"""Kind of record -> kind of interval, and where the record says its seconds: the first of these
that it has. Training waits for an asynchronous save at its beginning and at its end."""


@dataclass(frozen=True, slots=True)
class Sign:
    """What a record of ``metrics.jsonl`` says of the time."""

    time: float
    """When it was written, seconds since the epoch."""
    kind: str = ""
    """Of ``KINDS``: what the time before it was; empty: it says nothing of that."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Interval:
    """A piece of the wall time."""

    kind: str
    """Of ``KINDS``."""
    begin: float
    """Seconds since the epoch."""
    end: float


def read_attempts(stage: Path) -> list[dict[str, Any]]:
    """The starts of a stage that ``attempts.jsonl`` in its directory notes, the oldest first:
    ``attempt``, ``time``, and of all but the first ``former_ended``."""
    return [
        line
        for line in read_lines(stage / "attempts.jsonl")
        if isinstance(line.get("attempt"), int) and isinstance(line.get("time"), int | float)
    ]


def sign(record: Record) -> Sign | None:
    """Of a record of ``metrics.jsonl``; ``None`` where it has no time."""
    if not isinstance(record.get("time"), int | float):
        return None
    kind, *keys = _SECONDS.get(record["kind"], ("",))
    for key in keys:
        if isinstance(record.get(key), int | float):
            return Sign(float(record["time"]), kind, float(record[key]))
    return Sign(float(record["time"]))


def intervals(
    attempts: Sequence[Record], signs: Sequence[Sign], end: float | None = None
) -> list[Interval]:
    """The wall time of a stage, piece by piece, without gaps or overlaps.

    Args:
        attempts: as :func:`read_attempts` finds them.
        signs: of the records that the stage has kept.
        end: of the stage; ``None``: its last record.
    """
    if not attempts:
        return []
    starts = [float(attempt["time"]) for attempt in attempts]
    ordered = sorted(signs, key=lambda sign: sign.time)
    last = end if end is not None else max([starts[-1], *(sign.time for sign in ordered)])
    found: list[Interval] = []
    for place, (begin, until) in enumerate(pairwise([*starts, last])):
        ended = until
        if place + 1 < len(attempts):
            ended = min(until, max(begin, float(attempts[place + 1].get("former_ended", until))))
        own = [sign for sign in ordered if begin <= sign.time <= until]
        found += _attempt(begin, ended, own, killed=place + 1 < len(attempts))
        found.append(Interval("queue", ended, until))
    return [piece for piece in found if piece.end > piece.begin]


def _attempt(begin: float, ended: float, signs: Sequence[Sign], *, killed: bool) -> list[Interval]:
    """Of one attempt; what came after its last kept step is lost, if it was killed."""
    found: list[Interval] = []
    at, gap = begin, "start"
    for sign in signs:
        if not sign.kind or sign.time > ended:
            continue
        first = min(max(at, sign.time - sign.seconds), sign.time)
        found += [Interval(gap, at, first), Interval(sign.kind, first, sign.time)]
        at, gap = max(at, sign.time), "other"
    if killed and gap == "other":
        gap = "lost"
    return [*found, Interval(gap, at, ended)]


def seconds(pieces: Sequence[Interval]) -> dict[str, float]:
    """Seconds by kind; their sum is the wall time."""
    return {
        kind: sum(piece.end - piece.begin for piece in pieces if piece.kind == kind)
        for kind in KINDS
    }


def rank_seconds(records: Iterable[Record]) -> float | None:
    """Seconds in the training steps that a stage has kept (data, forward, backward, optimizer),
    each times the ranks that took it. Starts of processes, evaluations, saves and what was trained
    again after a crash are not in it.

    Args:
        records: all of the stage's ``metrics.jsonl``.

    Returns:
        ``None`` where no step says how long it took.
    """
    ranks, total = 1, 0.0
    known = False
    for record in records:
        if record["kind"] == "start":
            ranks = int(record.get("world_size", 1))
        elif record["kind"] == "train" and isinstance(record.get(STEP), int | float):
            total += ranks * record[STEP]
            known = True
    return total if known else None


def goodput(spent: Mapping[str, float]) -> float | None:
    """Productive over wall time; ``None`` of a stage that has not begun."""
    wall = sum(spent.values())
    return spent["productive"] / wall if wall else None
