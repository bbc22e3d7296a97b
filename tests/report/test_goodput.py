"""Where the wall time went: pieces that tile it, of runs that were killed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_btx.pipeline import state
from megatron_btx.report import goodput
from megatron_btx.report.goodput import KINDS, intervals
from megatron_btx.train import metrics
from tests.small import Exported


def train(step: int, at: float, seconds: float = 2.0) -> dict[str, Any]:
    return {"kind": "train", "step": step, "time": at, "time_metrics/end_to_end(s)": seconds}


def save(at: float, seconds: float) -> dict[str, Any]:
    return {"kind": "save", "step": 0, "time": at, "train/checkpoint_save_duration_s": seconds}


def evaluation(at: float, seconds: float) -> dict[str, Any]:
    return {"kind": "eval", "step": 0, "time": at, "time_metrics/evaluation(s)": seconds}


def test_a_killed_run_is_what_its_log_says() -> None:
    """Killed at 137 in its third step after the save at 130, requeued at 150; steps 3 and 4 were
    trained twice. The log has kept what the second attempt went on from, and its own."""
    attempts = [{"attempt": 1, "time": 100.0}, {"attempt": 2, "time": 150.0, "former_ended": 137.0}]
    records = [
        {"kind": "start", "step": 0, "time": 111.0},
        evaluation(115.0, 3.0),
        train(1, 120.0),
        train(2, 122.0),
        save(130.0, 8.0),
        {"kind": "start", "step": 2, "time": 160.0},
        train(3, 165.0),
        train(4, 168.0),
        save(170.0, 1.5),
    ]
    spent = goodput.seconds(intervals(attempts, records, end=171.0))
    assert spent == pytest.approx(
        {
            "productive": 2.0 + 2.0 + 2.0 + 2.0,
            "start": 12.0 + 13.0,
            "evaluation": 3.0,
            "save": 8.0 + 1.5,
            "lost": 7.0,
            "queue": 13.0,
            "other": 3.0 + 1.0 + 0.5 + 1.0,
        }
    )
    assert goodput.goodput(spent) == pytest.approx(8.0 / 71.0)


def test_a_run_killed_before_its_first_save_has_lost_all() -> None:
    """It starts over: its records are gone, and nothing of the first attempt is productive."""
    attempts = [{"attempt": 1, "time": 0.0}, {"attempt": 2, "time": 60.0, "former_ended": 50.0}]
    spent = goodput.seconds(intervals(attempts, [train(1, 75.0, 5.0)], end=75.0))
    assert spent["productive"] == 5.0
    assert spent["queue"] == 10.0
    assert spent["start"] + spent["lost"] == 60.0


times = st.floats(0, 1000)
record = st.one_of(
    st.builds(train, st.integers(1, 9), times, st.floats(0, 300)),
    st.builds(save, times, st.floats(0, 300)),
    st.builds(evaluation, times, st.floats(0, 300)),
)


@given(st.lists(st.tuples(times, times), min_size=1, max_size=4), st.lists(record), times)
def test_the_pieces_tile_the_wall_time(
    begun: list[tuple[float, float]], records: list[dict[str, Any]], last: float
) -> None:
    """In order, without gap or overlap, whatever clocks have said."""
    begun.sort()
    attempts = [{"attempt": n, "time": t, "former_ended": e} for n, (t, e) in enumerate(begun)]
    end = begun[-1][0] + last
    pieces = intervals(attempts, records, end)
    assert {piece.kind for piece in pieces} <= set(KINDS)
    for one, other in pairwise(pieces):
        assert one.end == other.begin
    if pieces:
        assert (pieces[0].begin, pieces[-1].end) == (begun[0][0], end)
    spent = goodput.seconds(pieces)
    assert sum(spent.values()) == pytest.approx(end - begun[0][0])


def test_an_interrupted_run(exported: Exported) -> None:
    """A real one: its seed was interrupted and went on."""
    directory = exported.run_dir / "seed"
    attempts = state.read_attempts(directory)
    assert len(attempts) == 2
    records = metrics.read(directory / "metrics.jsonl")
    finished = (state.find_json(directory / "done.json") or {})["finished"]
    pieces = intervals(attempts, records, finished)
    spent = goodput.seconds(pieces)
    assert sum(spent.values()) == pytest.approx(finished - attempts[0]["time"])
    kept = [r["time_metrics/end_to_end(s)"] for r in records if r["kind"] == "train"]
    # Times are logged in milliseconds; what two steps share of one is counted once.
    assert spent["productive"] == pytest.approx(sum(kept), abs=2e-3 * len(kept))
    assert spent["start"] > 0
    assert spent["queue"] > 0
    assert spent["save"] > 0
