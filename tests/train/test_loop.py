"""A run that is stopped and goes on is the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_btx.recipe.schema import Layout, MegatronOptions, Training
from megatron_btx.train.callbacks import CheckReplicas
from megatron_btx.weights.manifest import FORMAT, MANIFEST
from tests.engine.harness import DENSE, MOE, Case, assemble
from tests.ranks import RankError, Ranks
from tests.train.stages import run, seen_by_ranks

EP2 = Layout(data_parallel_size=2, expert_model_parallel_size=2)
DROPOUT = MegatronOptions(transformer={"hidden_dropout": 0.1})
CASES = {
    "dense": Case(DENSE),
    "dense-dp2-distopt-bf16": Case(
        DENSE, Layout(data_parallel_size=2), "bf16", use_distributed_optimizer=True
    ),
    "moe-ep2": Case(MOE, EP2),
    "moe-ep2-distopt": Case(MOE, EP2, use_distributed_optimizer=True),
    "moe-pp2": Case(MOE, Layout(pipeline_model_parallel_size=2)),
    # Draws from the generators at every step.
    "dense-tp2-dropout": Case(DENSE, Layout(tensor_model_parallel_size=2), megatron=DROPOUT),
}


def _losses(metrics: list[dict]) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in metrics if r["kind"] == "train"]


@pytest.mark.parametrize("name", CASES)
def test_stop_and_go_on(name: str, ranks: Ranks, tmp_path: Path) -> None:
    case = replace(CASES[name], steps=6)
    world = case.layout.world_size
    for directory in ("whole", "pieces"):
        (tmp_path / directory / "checkpoints").mkdir(parents=True)
    whole = ranks.run(run, world, case, str(tmp_path / "whole"), 6)

    # SIGTERM on one rank in step 3: all agree, save step 3 and leave.
    ranks.run(_stopping, world, case, str(tmp_path / "pieces"), 6, 3)
    kept = sorted(path.name for path in (tmp_path / "pieces" / "checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000003"]
    # As if killed later: step 3's checkpoint never got its name, its metrics are there.
    shutil.rmtree(tmp_path / "pieces" / "checkpoints" / "step_00000003")
    (tmp_path / "pieces" / "checkpoints" / "step_00000003.partial").mkdir()
    (tmp_path / "pieces" / "checkpoints" / "step_00000001.partial").mkdir()
    (tmp_path / "pieces" / "checkpoints" / "step_00000001.old").mkdir()
    together = ranks.run(run, world, case, str(tmp_path / "pieces"), 6)

    left = [path.name for path in (tmp_path / "pieces" / "checkpoints").iterdir()]
    assert left == ["step_00000006"], "nothing half written or half deleted stays"
    assert _losses(together[0][0]) == _losses(whole[0][0])
    assert [step for step, *_ in _losses(whole[0][0])] == [1, 2, 3, 4, 5, 6]
    ours, theirs = (assemble([rank[1] for rank in result]) for result in (together, whole))
    for key, value in theirs.items():
        assert np.array_equal(ours[key], value), key


def _stopping(case: Case, directory: str, steps: int, at: int) -> object:
    return run(case, directory, steps, stop_at=at)


def _drifting(case: Case, directory: str) -> object:
    return run(case, directory, 4, break_replica_at=3)


def test_drift_stops_the_run_before_it_is_saved(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    case = Case(DENSE, Layout(data_parallel_size=2), steps=4)
    with pytest.raises(RankError, match="after step 3 replicas of .* differ"):
        ranks.run(_drifting, 2, case, str(tmp_path))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_ranks_go_on_from_what_the_first_one_sees(ranks: Ranks, tmp_path: Path) -> None:
    """On a network file system another machine may not see the last checkpoint yet."""
    manifest = json.dumps({"format": FORMAT, **DENSE.to_json()})
    for step in (2, 4):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}" / MANIFEST).write_text(manifest)
    assert ranks.run(seen_by_ranks, 2, str(tmp_path)) == ["step_00000004"] * 2


def test_replicas_are_never_checked_at_interval_0() -> None:
    run: Any = SimpleNamespace(step=1, total_steps=1, stopped=True)  # and no model to look at
    CheckReplicas(Training(check_replicas_interval=0)).after_step(run, {})
