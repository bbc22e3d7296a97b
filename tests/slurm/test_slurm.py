"""The tiny recipe on a real Slurm: the whole graph, and every script."""

from __future__ import annotations

import json
import random
import subprocess

from megatron_btx.pipeline.slurm import script
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT, SECRET, Run

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
    assert "all selected stages are done" in again.stdout


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


def test_the_run_directory_tells_all_and_holds_no_key(whole: Run) -> None:
    for number, jobs in ((1, whole.first), (2, whole.second)):
        directory = whole.run_dir / "slurm" / f"submit-{number}"
        assert json.loads((directory / "jobs.json").read_text()) == jobs
        scripts = {path.stem for path in directory.glob("*.sbatch")}
        assert scripts == {name.replace(":", "-") for name in jobs}
        record = json.loads((directory / "environment.json").read_text())
        assert {"code_revision", "versions", "packages", "environment", "user"} <= set(record)
        assert (directory / "recipe.yaml").exists()
    assert (whole.run_dir / "finetune" / "log" / "attempt-1.log").exists()
    grep = ["grep", "-rlF", SECRET, str(whole.run_dir)]
    assert subprocess.run(grep, capture_output=True, text=True, check=False).stdout == ""


def test_slurm_reads_a_flag_as_it_was_written(cluster: Cluster) -> None:
    letters = random.Random(7)
    signs = "$`\"'\\;&|<>(){}[]*?!#~ %=:,abc"
    texts = ["".join(letters.choices(signs, k=12)).strip() for _ in range(40)]
    for text in ["$(touch hit)", "x # y", "a 'b \"c", *filter(None, texts)]:
        flag = script.flag(f"--comment={text}")
        batch = f"#!/bin/bash\n#SBATCH {flag}\ntrue\n"
        job = cluster("sbatch", "--parsable", "--hold", "--output=/dev/null", text=batch).strip()
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
        ROOT / "megatron_btx/pipeline/slurm/batch.sh",
    ]
    command = ["shellcheck", "--shell=bash", "--exclude=SC2154", *map(str, [*scripts, *shell])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
