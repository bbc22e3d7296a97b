"""The preparation as an array of jobs on a real Slurm: one requeued, one killed, gone on with."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil

from megatron_btx.data.prepare import prepare
from megatron_btx.recipe.load import load_recipe
from tests.data.test_prepare import tree
from tests.slurm.cluster import Cluster, wait
from tests.slurm.conftest import Run

WAITS_ONCE = """#!/bin/sh
# The first time that shares 1 and 2 are worked at, they do not get on.
case "$*" in
*slurm.attempt*) ;;
*prepare:shards/[12])
  mark={marks}/$SLURM_ARRAY_TASK_ID
  if [ ! -e "$mark" ]; then echo $$ >"$mark"; exec sleep 3600; fi ;;
esac
exec "$@"
"""
JOBS = ("prepare:begin", "prepare:shards", "prepare")


def test_one_job_of_the_array_requeued_and_one_killed(cluster: Cluster, tmp_path: Path) -> None:
    waits, marks = tmp_path / "waits", tmp_path / "marks"
    marks.mkdir()
    waits.write_text(WAITS_ONCE.format(marks=marks))
    waits.chmod(0o755)
    run = Run(cluster, tmp_path / "it")
    stages = "stages: {prepare: {tasks: 3, cpus_per_task: 1}}"
    run.write(f"slurm: {{launch_prefix: '{waits}', {stages}}}\n")
    jobs = run.submit("--only", "prepare", "--no-probe")
    assert list(jobs) == list(JOBS)
    array = jobs["prepare:shards"]
    wait(lambda: {path.name for path in marks.iterdir()} == {"1", "2"}, run.out())
    wait(lambda: (run.run_dir / "prepare/shards/0/done.json").exists(), run.out())

    rows = run.status()
    assert rows["prepare:begin"]["state"] == "done"
    assert rows["prepare:shards"]["state"] == "running"
    assert rows["prepare:shards"]["step"].startswith("1 of 3 done")
    assert rows["prepare"]["state"] == "pending"
    assert run.btx("submit", "--only", "prepare").returncode == 2

    cluster("scontrol", "requeue", f"{array}_1")
    wait(lambda: (run.run_dir / "prepare/shards/1/done.json").exists(), run.out())
    psutil.Process(int((marks / "2").read_text())).send_signal(signal.SIGKILL)
    run.finished()
    rows = run.status()
    assert (rows["prepare:shards"]["state"], rows["prepare:shards"]["restarts"]) == ("failed", 1)
    assert "prepare:shards/2: " in rows["prepare:shards"]["note"], rows
    assert rows["prepare"]["state"] == "cancelled"
    kept = shards(run)
    assert kept

    run.submit("--only", "prepare", "--no-probe")
    run.finished()
    assert run.status()["prepare"]["state"] == "done", run.out()
    assert not shards(run)
    local = tmp_path / "local"
    prepare(load_recipe(run.recipe), local)
    there = run.run_dir / "prepare"
    assert tree(there / "data") == tree(local / "data")
    assert tree(there / "tokenizer") == tree(local / "tokenizer")


def shards(run: Run) -> list[Path]:
    """What is tokenized and not joined."""
    return sorted(run.run_dir.glob("prepare/data/*/.shards*/*.json"))
