"""Batch scripts as text: nothing in a recipe can run a command; the templates are up to date."""

from __future__ import annotations

import dataclasses
import json
import os
import pwd
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_btx.cli.main import main
from megatron_btx.cli.slurm import select_stages
from megatron_btx.errors import UserError
from megatron_btx.pipeline import graph
from megatron_btx.pipeline.slurm import attempt, preflight, script
from megatron_btx.recipe import check
from megatron_btx.recipe import slurm as slurm_recipe
from megatron_btx.recipe.load import dump, load_recipe, parse_recipe
from megatron_btx.recipe.schema import Slurm, SlurmJob

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "examples" / "tiny" / "recipe.yaml"
RECIPE = load_recipe(TINY)
STAGES = graph.build(RECIPE)

NASTY = st.text(
    st.sampled_from("$`\"'\\;&|<>(){}[]*?!#~ %=-abz09é\n\t\x00") | st.characters(codec="utf-8"),
    min_size=1,
    max_size=12,
) | st.sampled_from(["$(touch hit)", "`touch hit`", "'; touch hit; '", "x\n touch hit", "$HOME"])


def _stage(name: str) -> graph.Stage:
    return graph.find(STAGES, name)


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(partition=NASTY, value=NASTY, module=NASTY, prefix=NASTY, python=NASTY, place=NASTY)
def test_no_value_runs_a_command(
    tmp_path: Path, partition: str, value: str, module: str, prefix: str, python: str, place: str
) -> None:
    """What check.py lets through arrives in bash as it was written, and nothing else happens."""
    block = Slurm(
        partition=partition,
        environment={"VALUE": value},
        modules=(module,),
        python=python,
        launch_prefix=prefix,
    )
    recipe = dataclasses.replace(RECIPE, slurm=block)
    assume(not list(slurm_recipe.problems(recipe)))
    place = place.replace("\x00", "").replace("/", "")
    assume(not re.search(r"[\x00-\x1f\x7f]", place))  # refused by submit
    run_dir = tmp_path / place
    text = script.script(
        recipe,
        _stage("seed"),
        run_dir=run_dir,
        output=run_dir / "out",
        python=python,
        token="t",
    )
    head = text[: text.index("# From here on the same")]
    show = """
module() { printf 'module %s\\0' "$2"; }
export -f module
"""
    tail = 'printf "%s\\0" "$VALUE" "$python" "$recipe" "${launch[@]}"\n'
    lines = [line for line in head.split("\n") if line.startswith("#SBATCH")]
    assert len(lines) == head.count("#SBATCH ") or "#SBATCH " in partition + value + place
    done = subprocess.run(
        ["bash", "-u", "-c", show + head + tail],
        cwd=tmp_path,
        capture_output=True,
        env={"PATH": os.environ["PATH"], "HOME": "/"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    words = [f"module {module}", value, python, str(run_dir / "recipe.yaml"), *shlex.split(prefix)]
    assert done.stdout == b"".join(word.encode() + b"\0" for word in words)
    assert list(tmp_path.iterdir()) == []


@given(NASTY)
def test_a_flag_is_one_word_to_slurm(word: str) -> None:
    """By sbatch's own rule: in quotes a character after a backslash is taken as it is. The
    cluster's tests ask sbatch itself."""
    out, escaped = "", False
    written = script.flag(word)
    quoted = written[0] == '"'
    assert not quoted or written[-1] == '"'
    for letter in written[1:-1] if quoted else written:
        if escaped:
            out, escaped = out + letter, False
        elif letter == "\\":
            escaped = True
        else:
            assert re.fullmatch(r"[\w@%+=:,./\[\]-]", letter)
            out += letter
    assert out == word


def test_the_templates_are_what_is_submitted() -> None:
    for kind in slurm_recipe.KINDS:
        path = ROOT / "slurm" / f"{kind}.sbatch"
        assert path.read_text() == script.template(kind), (
            "python -m megatron_btx.pipeline.slurm.script slurm"
        )
    assert {path.stem for path in ROOT.glob("slurm/*.sbatch")} == set(slurm_recipe.KINDS)


def test_the_block_is_in_no_key() -> None:
    block = Slurm(partition="x", stages={"expert": SlurmJob(nodes=1, time="5")})
    moved = dataclasses.replace(RECIPE, slurm=block)
    assert [s.key for s in graph.build(moved)] == [s.key for s in graph.build(RECIPE)]
    assert parse_recipe(dump(moved)) == moved


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("time: 24h", "is no time limit"),
        ("time: 24:00:00", "put it in quotes"),
        ("nodes: 0", "give at least 1"),
        ("mem: 3 cats", "is no amount of memory"),
        ('partition: "a\\nb"', "line break"),
        ('partition: ""', "is empty"),
        ("environment: {WANDB_API_KEY: abc}", "the jobs inherit it"),
        (f"environment: {{X: {'0a' * 20}}}", "looks like a key or token"),
        ("environment: {HF_TOKEN: x}", "looks like a key or token"),
        ("environment: {'A B': x}", "cannot name a variable"),
        ("environment: {SLURM_NTASKS: 3}", "is not the recipe's to set"),
        ("environment: {A: true}", "put it in quotes"),
        ("launch_prefix: apptainer exec --env=API_KEY=x image", "key or token"),
        ("launch_prefix: 'a \"b'", "close the quotes"),
        ("launch_prefix: 'pyxis: --container-image=x'", "`launch_prefix: --container-image=x`"),
        ("sbatch: [--wrap=ls]", "btx's own to set"),
        ("sbatch: [--depend=x]", "btx's own to set"),
        ("sbatch: [-d, x]", "btx's own to set"),
        ("sbatch: [ls]", "is no flag"),
        ("modules: ['--help']", "name a module"),
        ("stages: {expert:none: {}}", "is no stage of this recipe"),
        ("stages: {finetune: {nodes: 3}}", "2 ranks do not divide over 3 nodes"),
        ("signal_seconds: 0", "give at least 1"),
    ],
)
def test_bad_blocks(block: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(TINY.read_text() + f"slurm:\n  {block}\n")
    assert words in str(caught.value)
    assert "fix: " in str(caught.value)


def test_stages_override_kind_by_kind() -> None:
    recipe = parse_recipe(
        TINY.read_text()
        + """
slurm:
  partition: gpu
  time: "60"
  gpus_per_node: 1
  environment: {A: 1, B: 2}
  stages:
    expert: {time: "30"}
    expert:math: {partition: other, environment: {B: 3}}
    prepare: {partition: cpu}
"""
    )
    job = slurm_recipe.resolve(recipe, "expert:math")
    assert (job.partition, job.time, job.environment) == ("other", "30", {"A": 1, "B": 3})
    assert slurm_recipe.resolve(recipe, "expert:code").partition == "gpu"
    assert slurm_recipe.resolve(recipe, "prepare").gpus_per_node is None
    shape = slurm_recipe.shape(slurm_recipe.resolve(recipe, "finetune"), 2, 1)
    assert (shape.nodes, shape.ranks_per_node, shape.gpus_per_node) == (2, 1, 1)
    assert not list(slurm_recipe.problems(recipe))
    assert not check.problems(recipe)


def test_a_model_that_is_taken_needs_no_gpu() -> None:
    recipe = parse_recipe(TINY.read_text() + "slurm: {gpus_per_node: 1}\n")
    taken = replace(recipe.experts["code"], from_="there", tokens=None)
    recipe = replace(recipe, experts=recipe.experts | {"code": taken})
    assert slurm_recipe.resolve(recipe, "expert:code").gpus_per_node is None
    for name in ("expert:math", "seed", "dense", "finetune", "evaluate"):
        assert slurm_recipe.resolve(recipe, name).gpus_per_node == 1


def test_selection() -> None:
    def names(**wish: object) -> list[str]:
        return [stage.name for stage in select_stages(STAGES, **wish)]  # type: ignore[arg-type]

    assert names(only=["expert"]) == ["expert:code", "expert:math", "expert:prose"]
    assert names(first="finetune") == ["finetune", "evaluate", "export", "report"]
    assert names(last="expert:math") == ["prepare", "seed", "expert:math"]
    assert names(first="expert:math", last="mix") == ["expert:math", "mix"]
    with pytest.raises(UserError, match="there is no stage nosuch"):
        names(only=["nosuch"])


def test_dry_run_prints_all_and_changes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_btx.cli", "submit", str(TINY), "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    graph_first, *headers = done.stdout.split("\n\n##### ")
    assert graph_first.startswith("##### the graph\nprepare ")
    assert len(graph_first.splitlines()) == 12
    assert [text.split("\n")[0] for text in headers] == [stage.name for stage in STAGES]
    assert all(line.startswith("#SBATCH ") for line in headers[0].splitlines()[1:])
    whole = subprocess.run(
        [*command, "--scripts"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert whole.stdout.startswith(done.stdout.rpartition("\n\n")[0])
    assert whole.stdout.count("#!/bin/bash\n") == whole.stdout.count(script.body().rstrip()) == 11
    assert list(tmp_path.iterdir()) == []


def test_pyxis_flags_are_words_of_srun(capsys: pytest.CaptureFixture[str]) -> None:
    """The example for it, as docs/slurm.md shows it; the words as bash hands them to srun."""
    recipe = ROOT / "examples" / "from_huggingface" / "slurm.yaml"
    page = (ROOT / "docs" / "slurm.md").read_text()
    block = page.partition("--dry-run --scripts`) says as\n\n```bash\n")[2].partition("```")[0]
    assert main(["submit", str(recipe), "--dry-run", "--scripts"]) == 2, "models and text are yours"
    scripts = capsys.readouterr().out.split("\n\n##### ")
    (finetune,) = (text for text in scripts if text.startswith("finetune.sbatch\n"))
    assert block.count("\n") == 4
    assert all(f"\n{line}" in finetune for line in block.splitlines())
    assert "#SBATCH --nodes=2\n" in finetune
    assert "#SBATCH --ntasks=16\n" in finetune
    assert "#SBATCH --gpus-per-node=8\n" in finetune
    said = 'cpus=8 recipe=r.yaml stage=finetune; srun() { printf "%s\\n" "$@"; }\n' + block
    done = subprocess.run(["bash", "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        *("--kill-on-bad-exit=1", "--cpus-per-task=8", "--label"),
        *("--container-image=/images/btx.sqsh", "--container-mounts=/shared:/shared"),
        *("--no-container-mount-home", "python3", "-m", "megatron_btx.cli", "stage", "r.yaml"),
        "finetune",
    ]


@pytest.mark.parametrize("option", ["--exclude=n1", "-xn1", "-w n2", "--nodel=n2", "--res=big"])
def test_the_probe_takes_what_says_where(option: str) -> None:
    assert preflight._says_where(option)
    assert not any(map(preflight._says_where, ["--begin=now", "--exclusive", "--mail-type=END"]))


def test_without_slurm_the_error_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_btx.cli", "submit", str(TINY)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": "/nowhere"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Slurm's command is not on this machine" in done.stderr
    assert list(tmp_path.iterdir()) == []


SLURM = {
    "sinfo": "echo 'main*|4|64|infinite|gpu:8'",
    "scontrol": "echo 'Slurmctld(primary) is UP'",
    "squeue": "cat queue",
    "scancel": 'for job; do sed -i "/^$job/d" queue; done',
    "sbatch": """case $* in *--test-only*) exit 1;; esac
if [ -s queue ]; then exit 1; fi
place=$(sed -n 's/^#SBATCH --chdir=//p')
printf '7\\037PENDING\\037Held\\037%s\\037prepare@tiny\\037%s\\037sbatch\\n' $USER $place >queue
kill -TERM $PPID
exec sleep 600""",
}
"""Commands of a cluster whose nodes are all down: a job is tried by holding it."""


def test_a_wish_to_stop_leaves_no_job_that_was_held_for_a_trial(tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in SLURM.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    (tmp_path / "queue").touch()
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        pytest.skip("this user has no name")
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "USER": user}
    command = [sys.executable, "-m", "megatron_btx.cli", "submit", str(TINY)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stderr, done.stdout) == (130, "", "")
    assert (tmp_path / "queue").read_text() == ""
    assert sorted(os.listdir(tmp_path)) == ["bin", "queue"]


def _begin(recipe: Path, restart: int, job: str = "7") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_btx.pipeline.slurm.attempt", str(recipe), "seed"],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SLURM_JOB_ID": job,
            "SLURM_RESTART_COUNT": str(restart),
        },
        cwd=recipe.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_three_restarts_without_progress_are_enough(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {TINY}\nrun_dir: {tmp_path}/run\n")
    stages = {stage.name: stage for stage in graph.build(load_recipe(recipe))}
    (tmp_path / "run" / "prepare").mkdir(parents=True)
    record = {"key": stages["prepare"].key}
    (tmp_path / "run" / "prepare" / "done.json").write_text(json.dumps(record))
    for restart in range(3):
        done = _begin(recipe, restart)
        assert done.stdout.split()[:2] == ["begun", str(restart + 1)], done.stderr
    checkpoints = tmp_path / "run" / "seed" / "checkpoints"
    (checkpoints / "step_00000008").mkdir(parents=True)  # it gets on: counted anew
    for restart in range(3, 7):
        assert _begin(recipe, restart).returncode == 0
    done = _begin(recipe, 7)
    assert done.returncode == 2
    assert "restarted 3 times without progress" in done.stderr
    assert (tmp_path / "run" / "seed" / "error.json").exists()
    assert _begin(recipe, 0, job="8").returncode == 0  # submitted again
    assert attempt.progress(tmp_path / "run" / "seed") == "step_00000008"
