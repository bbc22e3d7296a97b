"""Whose jobs are in the queue and what keeps them there, on a real Slurm: another user's, those by
hand, held ones, nodes that are down, a full disk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad import fill
from tests.slurm.cluster import Cluster, wait
from tests.slurm.conftest import ROOT, WAITS, Run, branch
from tests.slurm.test_refused import HELD as LATER

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
NOBODY += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
"""Another user, who may read what is in a test's directories and no more than that."""

READABLE = LATER + "domains: {}\n"
"""Without text of the test's own: ``access`` does not count what a user is lent."""


def files(run: Run) -> dict[Path, bytes]:
    """Everything in the run's directory, but for its lock."""
    found = (path for path in run.run_dir.rglob("*") if path.is_file() and path.name != "lock")
    return {path: path.read_bytes() for path in found}


def share(run: Run) -> None:
    """With the group of ``NOBODY``."""
    for path in (run.run_dir, *run.run_dir.rglob("*")):
        os.chown(path, -1, 65534)
        path.chmod(0o775 if path.is_dir() else 0o664)


def test_a_second_user_is_told_whose_the_jobs_are(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, READABLE)
    jobs = run.submit("--no-probe")
    share(run)
    before = files(run)
    refused = run.btx("submit", "--no-probe", user=NOBODY)
    assert refused.returncode == 2, refused.stdout
    words = f"jobs of this run are in the queue: {jobs['prepare']} (prepare, of root)"
    assert words in refused.stderr
    assert "they are root's to end" in refused.stderr
    assert files(run) == before
    refused = run.btx("cancel", user=NOBODY)
    assert refused.returncode == 2
    assert "permission denied" in refused.stderr
    assert "ask the user whose they are" in refused.stderr
    assert len(run.queue()) == len(jobs)
    seen = run.btx("status", user=NOBODY)
    assert f"prepare       {jobs['prepare']}" in seen.stdout, seen.stderr
    assert run.btx("cancel").returncode == 0
    wait(lambda: not run.queue())
    share(run)
    done = run.btx("submit", "--no-probe", "--only", "prepare", user=NOBODY)  # now it may
    assert done.returncode == 0, done.stderr
    assert run.btx("cancel", user=NOBODY).returncode == 0


def test_where_other_users_jobs_are_hidden_the_owner_is_asked(tmp_path: Path) -> None:
    with Cluster(tmp_path / "cluster", nodes=1, extra="PrivateData=jobs\n") as cluster:
        run = Run(cluster, tmp_path / "recipe", READABLE)
        run.submit("--no-probe", "--only", "prepare")
        share(run)
        before = files(run)
        refused = run.btx("submit", "--no-probe", user=NOBODY)
        assert refused.returncode == 2, refused.stdout
        assert "was submitted by root" in refused.stderr
        assert files(run) == before


def test_a_job_by_hand_is_known_while_it_waits(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, LATER)
    other = Run(cluster, tmp_path / "other", LATER)
    script = str(ROOT / "slurm" / "expert.sbatch")
    command = ["sbatch", "--parsable", "--begin=now+1hour", script, run.recipe.name, "math"]
    output = subprocess.run(
        command, env=run.environment, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    job = output.strip()
    row = run.status()["expert:math"]
    assert (row["job"], row["state"], row["note"]) == (job, "pending", "BeginTime")
    assert {row["state"] for row in other.status().values()} == {"not started"}
    refused = run.btx("submit", "--no-probe")
    assert refused.returncode == 2
    assert f"jobs of this run are in the queue: {job} (expert:math)" in refused.stderr
    assert not (run.run_dir / "recipe.yaml").exists()
    assert "no jobs in the queue" in other.btx("cancel").stdout
    assert f"cancelled {job} (expert:math)" in run.btx("cancel").stdout
    wait(lambda: not run.queue())


def test_one_by_hand_under_another_name_is_known_once_it_has_begun(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = Run(cluster, tmp_path)
    waits, mine = tmp_path / "waits", tmp_path / "mine.sh"
    waits.write_text(WAITS)
    waits.chmod(0o755)
    template = (ROOT / "slurm" / "prepare.sbatch").read_text()
    mine.write_text(template.replace("launch=()", f"launch=({waits})"))
    command = ["sbatch", "--parsable", str(mine), str(run.recipe)]
    environment = {**run.environment, "BTX_PYTHON": sys.executable}
    output = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    job = output.strip()
    wait((run.run_dir / "prepare" / "attempts.jsonl").exists, "it to begin")
    row = run.status()["prepare"]
    assert (row["job"], row["state"], row["nodes"]) == (job, "running", "n1")
    for command_of_ours in ("submit", "run"):
        refused = run.btx(command_of_ours)
        assert refused.returncode == 2
        assert f"jobs of this run are in the queue: {job} (prepare)" in refused.stderr
    error = run.run_dir / "prepare" / "error.json"
    error.write_text("{}")  # it is over: the job may be an allocation that goes on
    assert "no jobs in the queue" in run.btx("cancel").stdout
    error.unlink()
    assert f"cancelled {job} (prepare)" in run.btx("cancel").stdout
    run.finished()
    assert run.status()["prepare"]["state"] == "cancelled"


@pytest.fixture
def resumed(cluster: Cluster) -> Iterator[None]:
    """Afterwards every node is as before."""
    yield
    (cluster.top / "prolog-fails").unlink(missing_ok=True)
    cluster.clear()
    for node in cluster.nodes:
        if cluster("sinfo", "-h", "-n", node, "-p", "test", "-o", "%T").strip() != "idle":
            cluster("scontrol", "update", f"nodename={node}", "state=resume")
    wait(cluster.ready, "the nodes to come back")


@pytest.mark.usefixtures("resumed")
def test_nodes_that_are_drained_only_delay(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path)
    for node in cluster.nodes:
        cluster("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    done = run.btx("submit", "--no-probe", "--only", "prepare")
    assert done.returncode == 0, done.stderr
    assert "warning: prepare: Slurm lets it wait" in done.stderr
    assert len(cluster.queue()) == 1  # and not the one that was tried
    wait(lambda: "DOWN" in run.status()["prepare"]["note"], "a reason")
    assert run.status()["prepare"]["state"] == "pending"
    run.write("slurm: {constraint: nosuch}\n")
    run.btx("cancel")
    wait(lambda: not run.queue())
    refused = run.btx("submit", "--no-probe", "--only", "prepare")
    assert refused.returncode == 2
    assert "Invalid feature specification" in refused.stderr


@pytest.mark.usefixtures("resumed")
def test_a_held_job_is_shown_as_held_and_goes_on(whole: Run, tmp_path: Path) -> None:
    cluster = whole.cluster
    run = branch(whole, tmp_path / "held", "", "prepare")
    (cluster.top / "prolog-fails").touch()
    job = run.submit("--no-probe", "--only", "seed")["seed"]
    wait(lambda: run.status()["seed"]["state"] == "held", "Slurm to hold it")
    row = run.status()["seed"]
    assert row["active"]
    assert "launch failed requeued held" in row["note"]
    assert f"scontrol release {job}" in row["note"]
    (cluster.top / "prolog-fails").unlink()
    for line in cluster("sinfo", "-h", "-N", "-p", "test", "-t", "drain", "-o", "%N").split():
        cluster("scontrol", "update", f"nodename={line}", "state=resume")
    cluster("scontrol", "release", job)
    run.finished()
    assert run.status()["seed"]["state"] == "done", run.out()
    assert run.steps("seed") == whole.steps("seed")


def test_the_probe_goes_where_the_job_would(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(
        cluster, tmp_path, "slurm: {sbatch: ['--nodelist=n4', --exclude=n1, --begin=now+1hour]}\n"
    )
    run.submit("--only", "prepare")
    words = ["squeue", "-h", "-t", "all", "-S", "-i", "-n", "probe@tiny", "-o", "%N"]
    assert cluster(*words).split()[0] == "n4"
    run.btx("cancel")
    wait(lambda: not run.queue())


def test_a_full_disk_is_said_where_no_file_can_be_written(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "btx-test", place], check=True)
    try:
        with Cluster(tmp_path / "cluster", nodes=1) as cluster:  # its nodes see what is mounted now
            run = Run(cluster, place / "run", LATER)
            _fill_and_mend(run, place)
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def _fill_and_mend(run: Run, place: Path) -> None:
    job = run.submit("--no-probe", "--only", "prepare")["prepare"]
    fill(place)
    run.cluster("scontrol", "update", f"job={job}", "starttime=now")
    run.finished()
    row = run.status()["prepare"]
    assert row["state"] == "failed"
    assert "no space left on its disk" in row["note"]
    assert not (run.run_dir / "prepare" / "error.json").exists()
    before = files(run)
    full = run.btx("submit", "--no-probe", "--only", "prepare")
    assert full.returncode == 2, full.stderr
    assert "no space left" in full.stderr
    assert files(run) == before
    (place / "filler").unlink()
    assert run.status()["prepare"]["note"] == row["note"]  # known also when there is room again
    job = run.submit("--no-probe", "--only", "prepare")["prepare"]
    run.cluster("scontrol", "update", f"job={job}", "starttime=now")
    run.finished()
    assert run.status()["prepare"]["state"] == "done", run.out()
