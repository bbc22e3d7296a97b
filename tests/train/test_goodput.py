"""Where the wall time went: pieces that tile it, of runs that were killed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_btx.pipeline import graph, state
from megatron_btx.pipeline.slurm import status, status_table
from megatron_btx.recipe.load import load_recipe
from megatron_btx.report import page
from megatron_btx.report.run_data import gather
from megatron_btx.train import goodput, metrics
from megatron_btx.train.goodput import KINDS, Sign, intervals
from megatron_btx.train.summary import P50, P95, STEP, Summary
from tests.small import Exported


def signs(records: Iterable[dict[str, Any]]) -> list[Sign]:
    return [found for record in records if (found := goodput.sign(record)) is not None]


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
    spent = goodput.seconds(intervals(attempts, signs(records), end=171.0))
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
    spent = goodput.seconds(intervals(attempts, signs([train(1, 75.0, 5.0)]), end=75.0))
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
    pieces = intervals(attempts, signs(records), end)
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
    attempts = goodput.read_attempts(directory)
    assert len(attempts) == 2
    records = metrics.read(directory / "metrics.jsonl")
    finished = (state.find_json(directory / "done.json") or {})["finished"]
    pieces = intervals(attempts, signs(records), finished)
    spent = goodput.seconds(pieces)
    assert sum(spent.values()) == pytest.approx(finished - attempts[0]["time"])
    kept = [r["time_metrics/end_to_end(s)"] for r in records if r["kind"] == "train"]
    # Times are logged in milliseconds; what two steps share of one is counted once.
    assert spent["productive"] == pytest.approx(sum(kept), abs=2e-3 * len(kept))
    assert spent["start"] > 0
    assert spent["queue"] > 0
    assert spent["save"] > 0


def test_a_summary_is_of_known_numbers() -> None:
    """Of 100 steps of 1 s, 2 s, ..., 100 s that came one after the other, and an evaluation."""
    at, records = 0.0, []
    for step in range(1, 101):
        at += step
        records.append(
            {
                **train(step, at, float(step)),
                "throughput/device/MFU": step / 1000,
                "memory/max_reserved(GiB)": step % 7,
            }
        )
    records.append({**evaluation(at + 10, 10.0), "moe/cv_mean": 0.5, "moe": {"math": [{"cv": 1}]}})
    summary = Summary(records)
    found = summary.values([{"attempt": 1, "time": 0.0}])
    assert (found[P50], found[P95]) == pytest.approx((50.5, 95.05))
    assert STEP not in found
    assert found["throughput/device/MFU"] == pytest.approx(0.0505)
    assert found["memory/max_reserved(GiB)"] == 6
    assert found["moe/cv_mean"] == 0.5
    assert found["goodput/wall(s)"] == pytest.approx(5060)
    assert found["goodput/share"] == pytest.approx(5050 / 5060)
    assert summary.experts == {"math": [{"cv": 1}]}
    assert Summary().values([]) == {}


def test_every_view_shows_the_same_numbers(exported: Exported) -> None:
    """metrics.jsonl, ``btx status``, the page; W&B's is in tests/cli/test_wandb.py."""
    recipe = load_recipe(exported.directory / "recipe.yaml")
    directory = exported.run_dir / "seed"
    attempts, finished = goodput.read_attempts(directory), state.find_json(directory / "done.json")
    assert finished is not None
    records = metrics.read(directory / "metrics.jsonl")
    last = max(place for place, record in enumerate(records) if record["kind"] == "summary")
    logged = {name: value for name, value in records[last].items() if "/" in name}
    assert logged == Summary(records[:last]).values(attempts)
    expected = Summary(records).values(attempts, finished["finished"])
    for name in (P50, P95, "throughput/device/TPS", "train/checkpoint_save_GBps", "goodput/share"):
        assert expected[name] > 0
    stages = graph.of_run(recipe, exported.run_dir)
    rows = status.rows(exported.run_dir.absolute(), stages)
    (row,) = (row for row in rows if row.stage == "seed")
    assert row.numbers == expected
    assert gather(recipe, exported.run_dir, stages).by_name["seed"].numbers == expected
    share = f"{expected['goodput/share']:.1%}"
    assert share in status_table.numbers_text(rows)
    assert share in status_table.table(rows)
    assert f">{share}<" in page.render(gather(recipe, exported.run_dir, stages))
