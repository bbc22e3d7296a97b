"""The tiny recipe on a real Slurm: the whole graph, and everything that can befall a job."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.pipeline import sbatch
from tests.slurm.cluster import Cluster, wait
from tests.slurm.conftest import ROOT, SECRET, SLOW, Run, branch, longer_finetune

ALL = "prepare seed expert:code expert:math expert:prose mix finetune dense evaluate export report"


def test_a_failing_expert_takes_what_waits_for_it_and_nothing_else(whole: Run) -> None:
    states = {name: row["state"] for name, row in whole.failed.items()}
    assert list(states) == ALL.split()
    fine = {"prepare", "seed", "expert:code", "expert:prose", "dense"}
    assert {name for name, state in states.items() if state == "done"} == fine
    assert states["expert:math"] == "failed"
    assert "dropout" in whole.failed["expert:math"]["note"]
    for name in ("mix", "finetune", "evaluate", "export", "report"):
        assert states[name] == "cancelled", name
        assert "was not done" in whole.failed[name]["note"]


def test_mended_only_what_is_missing_is_submitted(whole: Run) -> None:
    assert list(whole.first) == ALL.split()
    expected = ["expert:math", "mix", "finetune", "evaluate", "export", "report"]
    assert list(whole.second) == expected
    assert {row["state"] for row in whole.status().values()} == {"done"}, whole.out()
    assert set(json.loads((whole.run_dir / "results.json").read_text())["systems"]) >= {
        "seed",
        "btx",
        "dense",
    }
    assert (whole.run_dir / "report.html").stat().st_size > 10_000
    again = whole.btx("submit")
    assert again.returncode == 0
    assert "all that was asked for is done" in again.stdout


def test_experts_were_jobs_side_by_side(whole: Run) -> None:
    jobs = [whole.cluster.state(whole.first[f"expert:{name}"]) for name in ("code", "prose")]
    first, second = ((job["StartTime"], job["EndTime"]) for job in jobs)
    assert first[0] < second[1]
    assert second[0] < first[1]


def test_the_finetuning_ran_on_two_hosts(whole: Run) -> None:
    assert whole.cluster.state(whole.second["finetune"])["NodeList"] == "n[1-2]"
    assert whole.steps("finetune")[-1][0] == 24
    start = json.loads((whole.run_dir / "finetune" / "metrics.jsonl").read_text().split("\n")[0])
    assert start["world_size"] == 2
    manifest = next((whole.run_dir / "finetune").glob("checkpoints/*/manifest.json"))
    assert json.loads(manifest.read_text())["layout"]["expert_model_parallel_size"] == 2


def test_the_same_losses_as_without_slurm(whole: Run, tmp_path: Path) -> None:
    local = branch(whole, tmp_path, "wandb: {mode: offline}\n", "prepare")
    done = local.btx("run", "--until", "expert:math")
    assert done.returncode == 0, done.stderr
    for stage in ("seed", "expert-math"):
        assert local.steps(stage) == whole.steps(stage)


def test_the_run_directory_tells_all_and_holds_no_key(whole: Run) -> None:
    for number, jobs in ((1, whole.first), (2, whole.second)):
        directory = whole.run_dir / "slurm" / f"submit-{number}"
        assert json.loads((directory / "jobs.json").read_text()) == jobs
        scripts = {path.stem for path in directory.glob("*.sbatch")}
        assert scripts == {name.replace(":", "-") for name in jobs}
        record = json.loads((directory / "environment.json").read_text())
        assert {"code_revision", "versions", "packages", "environment", "user"} <= set(record)
        assert (directory / "recipe.yaml").exists()
    assert (whole.run_dir / "finetune" / "log" / "attempt-1.log").stat().st_size
    grep = ["grep", "-rlF", SECRET, str(whole.run_dir)]
    assert subprocess.run(grep, capture_output=True, text=True, check=False).stdout == ""


def test_usr1_is_passed_to_two_hosts_which_save_and_go_on(
    whole: Run, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """As ``--signal=B:USR1@`` sends it, now and without a time limit."""
    run = longer_finetune(whole, tmp_path)
    job = run.submit("--only", "finetune")["finetune"]
    run.training("finetune", job)
    run.cluster("scancel", "--batch", "--signal=USR1", job)
    wait(lambda: (run.run_dir / "finetune" / "stopped.json").exists(), 30, run.out())
    stopped = json.loads((run.run_dir / "finetune" / "stopped.json").read_text())
    assert (run.run_dir / stopped["checkpoint"] / "manifest.json").exists()
    assert 60 <= stopped["step"] < 200
    logs = subprocess.Popen(
        [sys.executable, "-m", "megatron_btx.cli", "logs", str(run.recipe), "finetune", "-f"],
        env=run.cluster.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    run.finished()
    row = run.status()["finetune"]
    assert (row["state"], row["restarts"]) == ("done", 1), run.out()
    assert "requeued: the ranks have saved" in run.out()
    assert run.steps("finetune") == undisturbed["finetune"]
    output, _ = logs.communicate(timeout=20)
    assert logs.returncode == 0, output
    offline = list((run.run_dir / "finetune" / "wandb").glob("offline-run-*"))
    assert len(offline) == 2  # a piece an attempt,
    assert len({path.name.rpartition("-")[2] for path in offline}) == 1  # one run


def slow_seed(whole: Run, directory: Path) -> tuple[Run, str]:
    """A seed that is training."""
    run = branch(whole, directory, f"seed: {SLOW}\n", "prepare")
    job = run.submit("--only", "seed")["seed"]
    run.training("seed", job)
    return run, job


def test_scontrol_requeue(whole: Run, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    run, job = slow_seed(whole, tmp_path)
    run.cluster("scontrol", "requeue", job)
    wait(lambda: run.cluster.state(job)["Restarts"] == "1", 30)
    run.finished()
    assert run.status()["seed"]["state"] == "done", run.out()
    assert run.steps("seed") == undisturbed["seed"]


def test_a_node_goes_down(whole: Run, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    run, job = slow_seed(whole, tmp_path)
    node = run.cluster.state(job)["NodeList"]
    run.cluster("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    wait(lambda: run.cluster.state(job)["Restarts"] == "1", 30)
    if "DOWN" in run.cluster("scontrol", "-o", "show", "node", node):  # comes back by itself
        run.cluster("scontrol", "update", f"nodename={node}", "state=resume")
    run.finished()
    assert run.status()["seed"]["state"] == "done", run.out()
    assert run.steps("seed") == undisturbed["seed"]


def test_a_rank_is_killed_and_the_stage_submitted_again(
    whole: Run, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    run = longer_finetune(whole, tmp_path)
    job = run.submit("--only", "finetune")["finetune"]
    run.training("finetune", job, after=70)  # a checkpoint after 50
    run.kill_rank("finetune")
    run.finished(60)
    row = run.status()["finetune"]
    assert row["state"] == "failed"
    assert row["note"]
    assert run.submit("--only", "finetune") != {}
    run.finished()
    assert run.status()["finetune"]["state"] == "done", run.out()
    resumed = (run.run_dir / "finetune" / "log" / "attempt-2.log").exists()
    assert resumed
    assert run.steps("finetune") == undisturbed["finetune"]


def test_cancelled_and_submitted_again(
    whole: Run, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    run, _ = slow_seed(whole, tmp_path)
    refused = run.btx("submit", "--only", "seed")
    assert refused.returncode == 2
    assert "jobs of this run are in the queue" in refused.stderr
    done = run.btx("cancel")
    assert "(seed)" in done.stdout, done.stderr
    run.finished(60)
    assert run.status()["seed"]["state"] in ("cancelled", "stopped")
    run.submit("--only", "seed")
    run.finished()
    assert run.steps("seed") == undisturbed["seed"]


def test_a_template_by_hand(whole: Run, tmp_path: Path) -> None:
    run = branch(whole, tmp_path, "wandb: {mode: offline}\n", "prepare", "seed")
    environment = {**run.cluster.environment, "BTX_PYTHON": sys.executable}
    command = ["sbatch", "--parsable", "--export=ALL", str(ROOT / "slurm" / "expert.sbatch")]
    job = subprocess.run(
        [*command, str(run.recipe), "math"],
        env={**environment, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    run.finished()
    text = (tmp_path / f"expert-{job}.out").read_text()
    assert "expert:math: done" in text, text
    assert run.steps("expert-math") == whole.steps("expert-math")


def test_gpus_are_asked_for(whole: Run, tmp_path: Path) -> None:
    """Device files only: Slurm counts them, no rank can use them, so the job waits held."""
    gpus = "slurm: {gpus_per_node: 4, sbatch: [--begin=now+1hour]}\n"
    text = gpus + "seed: {layout: {data_parallel_size: 8}, micro_batch_size: 1}\n"
    run = branch(whole, tmp_path, text, "prepare")
    job = run.submit("--only", "seed")["seed"]
    state = run.cluster.state(job)
    assert state["TresPerNode"] == "gres:gpu:4"
    assert state["NumNodes"].startswith("2")
    assert run.btx("cancel").returncode == 0


def test_the_time_limit_comes_with_a_signal(whole: Run, tmp_path: Path) -> None:
    """Slurm looks every half minute and counts in whole ones."""
    seed = SLOW.replace("204_800", "20_480_000")
    text = "slurm: {environment: {GLOO_SOCKET_IFNAME: lo}, signal_seconds: 50}\n"
    run = branch(whole, tmp_path, f"{text}seed: {seed}\n", "prepare")
    run.write(text.replace("signal", 'time: "1", signal') + f"seed: {seed}\n")
    job = run.submit("--only", "seed")["seed"]
    wait(lambda: run.cluster.state(job)["Restarts"] == "1", 90, run.out())
    assert "asked to stop (USR1)" in run.out()
    assert "requeued: " in run.out()
    run.btx("cancel")
    run.finished(60)


def test_slurm_reads_a_flag_as_it_was_written(cluster: Cluster) -> None:
    letters = random.Random(7)
    signs = "$`\"'\\;&|<>(){}[]*?!#~ %=:,abc"
    texts = ["".join(letters.choices(signs, k=12)).strip() for _ in range(40)]
    for text in ["$(touch hit)", "x # y", "a 'b \"c", *filter(None, texts)]:
        flag = sbatch.flag(f"--comment={text}")
        script = f"#!/bin/bash\n#SBATCH {flag}\ntrue\n"
        job = cluster("sbatch", "--parsable", "--hold", "--output=/dev/null", text=script).strip()
        lines = cluster("scontrol", "show", "job", job).splitlines()
        seen = next(line.strip() for line in lines if line.strip().startswith("Comment="))
        assert seen == f"Comment={text}"
    cluster.clear()


def test_every_script_is_accepted(cluster: Cluster, whole: Run) -> None:
    scripts = [*ROOT.glob("slurm/*.sbatch"), *whole.run_dir.glob("slurm/*/*.sbatch")]
    assert len(scripts) >= 9 + 11 + 6
    for path in scripts:
        done = subprocess.run(
            ["sbatch", "--test-only", str(path), "RECIPE", "math"],
            env=cluster.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (path, done.stderr)
    shell = [
        ROOT / ".ci" / "run",
        *ROOT.glob("tools/*.sh"),
        ROOT / "megatron_btx/pipeline/batch.sh",
    ]
    command = ["shellcheck", "--shell=bash", "--exclude=SC2154", *map(str, [*scripts, *shell])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


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
    wait(lambda: not cluster.queue(), 10, "the probe to be gone")
    assert sorted(tmp_path.rglob("*")) == before


def test_two_submits_at_once_and_one_that_was_killed(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, "slurm: {sbatch: [--begin=now+1hour]}\n")
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
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    assert len(cluster.queue()) == 11
    assert run.btx("cancel").returncode == 0
    wait(lambda: not cluster.queue(), 20)
    process = subprocess.Popen(command, env=cluster.environment, stdout=subprocess.DEVNULL)
    wait(lambda: len(cluster.queue()) >= 2, 30)
    process.kill()
    process.wait()
    assert len(cluster.queue()) >= 2
    refused = run.btx("submit")
    assert refused.returncode == 2
    assert "jobs of this run are in the queue" in refused.stderr
    assert run.status()["prepare"]["state"] == "pending"
    assert run.btx("cancel").returncode == 0
    wait(lambda: not cluster.queue(), 20)


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
        wait(lambda: not cluster.queue(), 10, "the probe to be gone")
        assert list(shared.iterdir()) == []
        # Not probed, a job says so itself where it can, and status where it cannot.
        run.submit("--no-probe", "--only", "prepare")
        run.finished(60)
        row = run.status()["prepare"]
        assert row["state"] == "failed"
        assert "do the nodes share the run's directory?" in row["note"]
