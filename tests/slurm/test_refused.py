"""What a submission refuses, on a real Slurm, and what is known when there is no answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.accounting import AccountedCluster
from tests.slurm.cluster import Cluster, wait
from tests.slurm.conftest import Run, branch

HELD = "slurm: {sbatch: [--begin=now+1hour]}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slurm: {partition: nowhere}", "there is no partition nowhere"),
        ("slurm: {stages: {seed: {nodes: 8}}}\nseed: {layout: {data_parallel_size: 8}, "
         "micro_batch_size: 1}", "test has 4 that would do"),
        ("slurm: {cpus_per_task: 17}", "17 cores a node, and no node of test has more than 16"),
        ('slurm: {partition: small, time: "20"}', "20 is more than small allows (10 minutes)"),
        ("slurm: {gpus_per_node: 8}\nseed: {layout: {data_parallel_size: 8}, micro_batch_size: 1}",
         "8 GPUs a node, and no node of test has more than 4"),
        ("slurm: {constraint: nosuch}", "nvalid feature"),
        ("slurm: {sbatch: [--reservation=nosuch]}", "eservation"),
        ("slurm: {python: /no/such/python}", "/no/such/python on the nodes"),
        ("slurm: {partition: [", "is not YAML"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_whole(
    cluster: Cluster, tmp_path: Path, text: str, words: str
) -> None:
    run = Run(cluster, tmp_path, text)
    before = sorted(tmp_path.rglob("*"))
    done = run.btx("submit")
    assert done.returncode == 2, done.stdout
    assert words in done.stderr
    assert "fix: " in done.stderr
    assert "Traceback" not in done.stderr
    wait(lambda: not cluster.queue(), "the probe to be gone")
    assert sorted(tmp_path.rglob("*")) == before


def test_two_submits_at_once_and_one_that_was_killed(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, HELD)
    command = [sys.executable, "-m", "megatron_btx.cli", "submit", str(run.recipe), "--no-probe"]
    both = [
        subprocess.Popen(
            command,
            env=cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    assert len(cluster.queue()) == 11
    assert run.btx("cancel").returncode == 0
    wait(lambda: not cluster.queue())
    process = subprocess.Popen(command, env=cluster.environment, stdout=subprocess.DEVNULL)
    wait(lambda: len(cluster.queue()) >= 2)
    process.kill()
    process.wait()
    assert len(cluster.queue()) >= 2
    refused = run.btx("submit")
    assert refused.returncode == 2
    assert "jobs of this run are in the queue" in refused.stderr
    assert run.status()["prepare"]["state"] == "pending"
    assert run.btx("cancel").returncode == 0
    wait(lambda: not cluster.queue())


def test_a_directory_that_nodes_do_not_share(tmp_path: Path) -> None:
    shared = tmp_path / "here"
    shared.mkdir()
    with Cluster(tmp_path / "cluster", nodes=1, unshared=shared) as cluster:
        run = Run(cluster, tmp_path / "recipe")
        run.run_dir = shared / "run"
        run.write("slurm: {partition: test}\n")
        done = run.btx("submit")
        assert done.returncode == 2
        assert "the node n1 does not share this directory" in done.stderr
        wait(lambda: not cluster.queue(), "the probe to be gone")
        assert list(shared.iterdir()) == []
        # Not probed, a job says so itself where it can, and status where it cannot.
        run.submit("--no-probe", "--only", "prepare")
        run.finished()
        row = run.status()["prepare"]
        assert row["state"] == "failed"
        assert "do the nodes share the run's directory?" in row["note"]


def test_what_a_stage_needs_is_not_done(whole: Run, tmp_path: Path) -> None:
    run = branch(whole, tmp_path, "", "prepare", "seed", "expert-code")
    (run.run_dir / "expert-code" / "done.json").unlink()
    done = run.btx("submit", "--only", "finetune")
    assert done.returncode == 2
    assert "finetune: needs expert:code, expert:math, expert:prose, which is" in done.stderr
    assert not run.queue()


def test_a_watch_outlives_the_controller(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, HELD)
    run.submit("--no-probe", "--only", "prepare")
    watch = run.start("status", "--watch", "0.2", "--json")
    assert watch.stdout is not None
    assert watch.stdout.readline() == "[\n"
    cluster.stop("controller")
    wait(lambda: "squeue: " in watch.stdout.readline(), "the watch to notice")  # type: ignore
    cluster.start_controller()
    wait(lambda: watch.stdout.readline() == "[\n", "the watch to go on")  # type: ignore
    assert run.btx("cancel").returncode == 0
    seen = watch.stdout.read()
    assert watch.wait(600) == 0
    last = json.loads("[\n" + seen.rpartition("\n[\n")[2])
    assert last[0]["state"] == "cancelled"
    wait(cluster.ready, "the nodes to come back")


def test_an_accounting_database_and_a_limit(tmp_path: Path) -> None:
    """All or none where Slurm refuses in the middle; what is over is known from ``sacct``."""
    with AccountedCluster(tmp_path / "cluster", nodes=1) as cluster:
        lab = HELD.replace("{", "{account: lab, ", 1)
        run = Run(cluster, tmp_path / "refused", lab)
        done = run.btx("submit", "--no-probe")
        assert done.returncode == 2
        assert "AssocMaxSubmitJobLimit" in done.stderr
        assert "nothing was submitted" in done.stderr
        wait(lambda: not cluster.queue())
        assert not run.run_dir.exists()
        first, failed = (
            run.submit("--no-probe", "--only", "prepare"),
            Run(cluster, tmp_path / "failed"),
        )
        before = _content(run.run_dir)
        assert run.btx("cancel").returncode == 0
        wait(lambda: not cluster.queue())
        assert run.btx("submit", "--no-probe").returncode == 2  # as it was before
        assert _content(run.run_dir) == before
        failed.write("slurm: {account: lab, python: /bin/false}\n")
        second = failed.submit("--no-probe", "--only", "prepare")
        failed.finished()

        def accounted() -> bool:
            jobs = f"{first['prepare']},{second['prepare']}"
            lines = cluster("sacct", "-nXP", "-j", jobs, "-o", "JobName,State").splitlines()
            return lines == ["prepare@tiny|CANCELLED by 0", "prepare@tiny|FAILED"]

        wait(accounted, "slurmdbd to write it down")
        cluster.stop("controller")
        cluster.start_controller("-c")
        wait(cluster.ready, "the nodes to come back")
        for one, jobs, state, nodes in (
            (run, first, "cancelled", ""),
            (failed, second, "failed", "n1"),
        ):
            row = one.status()["prepare"]
            assert (row["job"], row["state"], row["nodes"]) == (jobs["prepare"], state, nodes)


def _content(run_dir: Path) -> dict[Path, bytes]:
    """All that a run's directory holds but the memo of hashes, which any look may leave."""
    files = (path for path in run_dir.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if path.name != "fingerprints.json"}
