"""The parts of a preparation that Slurm runs as an array of jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.errors import UserError
from megatron_btx.pipeline import graph, prepare_array, state, worker
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.slurm import attempt, script, submit
from megatron_btx.recipe.load import load_recipe, parse_recipe
from megatron_btx.recipe.schema import Recipe
from tests.pipeline.slurm.test_script import TINY

ARRAY = "slurm: {stages: {prepare: {tasks: 3, time: '60'}}}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "run" / "recipe.yaml"
    path.parent.mkdir()
    path.write_text(f"base: {TINY}\nrun_dir: {tmp_path / 'run'}\n{ARRAY}")
    return load_recipe(path)


def test_jobs_and_what_they_wait_for(recipe: Recipe) -> None:
    stages = graph.outline(recipe)
    found = prepare_array.expand(recipe, stages)
    assert [stage.name for stage in found[:4]] == [
        prepare_array.BEGIN,
        prepare_array.SHARDS,
        "prepare",
        "seed",
    ]
    assert [stage.needs for stage in found[:3]] == [
        (),
        (prepare_array.BEGIN,),
        (prepare_array.SHARDS,),
    ]
    assert found[3:] == stages[1:]
    plain = parse_recipe(TINY.read_text())
    assert prepare_array.expand(plain, graph.outline(plain)) == graph.outline(plain)
    text = submit.dry_run(recipe, Path("run"), found)
    assert "prepare:shards  3 jobs of 1 node x 1  after prepare:begin\n" in text
    flags = script.flags(recipe, found[1], Path("/r"), Path("/r/s/prepare-shards.out"))
    assert {"--array=0-2", "--output=/r/s/prepare-shards-%a.out", "--time=60"} <= set(flags)
    keys = [stage.key for stage in graph.build(plain)]
    assert [stage.key for stage in graph.build(recipe)] == keys


@pytest.mark.parametrize("name", ["prepare:shards", "prepare:shards/01", "prepare:shards/x",
                                  "prepare:begin/0", "prepare:rest", "seed/0"])  # fmt: skip
def test_no_such_part(recipe: Recipe, name: str) -> None:
    with pytest.raises(UserError, match="stage"):
        prepare_array.find(graph.outline(recipe), name)


@pytest.mark.parametrize("block", ["{tasks: 4}", "{stages: {seed: {tasks: 2}}}"])
def test_other_stages_have_no_parts(block: str) -> None:
    with pytest.raises(UserError, match=r"tasks.*is for prepare alone"):
        parse_recipe(TINY.read_text() + f"slurm: {block}\n")


def test_each_part_by_hand(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ranks of any other scheduler; a part that is begun again does what is left."""
    run_dir, ran = Path(recipe.run_dir), []

    def work(recipe: Recipe, stage: Stage, run_dir: Path) -> Any:
        ran.append((stage.name, prepare_array.share(recipe, stage, run_dir)))
        return {"made": len(ran)}

    monkeypatch.setitem(worker.KINDS, "prepare", work)

    def run(name: str) -> int:
        for variable in ("BTX_ATTEMPT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(variable, raising=False)
        return worker.main([str(run_dir / "recipe.yaml"), name])

    assert run("prepare:shards/1") == 2
    assert "needs prepare:begin first" in capsys.readouterr().err
    for name in ("prepare:begin", "prepare:shards/1", "prepare:shards/2", "prepare:shards/1"):
        assert run(name) == 0
    assert run("prepare:shards/3") == 2
    assert "is not below slurm.stages.prepare.tasks (3)" in capsys.readouterr().err
    shares = [("prepare:shards/1", (1, 3)), ("prepare:shards/2", (2, 3))]
    assert ran == [("prepare:begin", None), *shares, shares[0]]
    (stage,) = (stage for stage in graph.of_run(recipe, run_dir) if stage.name == "prepare")
    assert state.done(run_dir, stage) is None
    record = json.loads((run_dir / "prepare/shards/1/done.json").read_text())
    assert (record["key"], record["attempts"], record["outputs"]) == (stage.key, 3, {"made": 4})
    assert run("prepare") == 0
    assert state.done(run_dir, stage) is not None
    assert run("prepare:shards/2") == 0
    assert len(ran) == 5  # what is whole needs no part


def test_a_job_of_the_array_begins_as_other_jobs_do(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = Path(recipe.run_dir)
    stage = graph.of_run(recipe, run_dir)[0]
    monkeypatch.setenv("BTX_STAGE_KEY", stage.key)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    place = run_dir / "prepare" / "shards" / "2"
    for number in (1, 2, 3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(number - 1))
        shard = run_dir / f"prepare/data/code/.shards-train/{number:06}.json"
        shard.parent.mkdir(parents=True, exist_ok=True)
        shard.write_text("{}")  # it has got on
        assert attempt.begin(recipe, "prepare:shards/2") == (number, stage.key, place)
        assert (place / "log" / f"attempt-{number}.log").exists()
    assert [line["progress"] for line in state.read_attempts(place)] == ["0.1", "0.2", "0.3"]
    assert not (run_dir / "prepare" / "stage.json").exists()
    assert attempt.begin(recipe, "prepare:begin")[0] == 1
    assert (run_dir / "prepare" / "stage.json").exists()
