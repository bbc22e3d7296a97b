"""``btx run`` as a user runs it: the whole tiny recipe, run again, and killed over and over."""

from __future__ import annotations

import glob
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from megatron_btx.recipe import run_plan
from megatron_btx.recipe.load import load_recipe
from megatron_btx.report import routing
from megatron_btx.train.metrics import read

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny" / "recipe.yaml"
STAGES = ("seed", "expert-code", "expert-math", "expert-prose", "dense", "finetune")


def start(directory: Path, *options: str) -> subprocess.Popen[str]:
    """``btx run`` on the tiny recipe, writing under ``directory``."""
    recipe = directory / "recipe.yaml"
    recipe.write_text(f"base: {TINY}\nname: tiny\n")
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_btx.cli", "run", str(recipe), *options],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str], timeout: float = 600) -> str:
    """Its output, once it has ended well."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One undisturbed run of the tiny recipe, shared by all tests; its run directory."""
    directory = tmp_path_factory.mktemp("whole")
    finish(start(directory))
    return directory / "runs" / "tiny"


def losses(run_dir: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Every training step of every stage, as logged."""
    return {
        stage: [
            (record["step"], record["loss"], record["grad_norm"])
            for record in read(run_dir / stage / "metrics.jsonl")
            if record["kind"] == "train"
        ]
        for stage in STAGES
    }


def results(run_dir: Path) -> dict[str, Any]:
    """The table of the run."""
    return json.loads((run_dir / "results.json").read_text())


def test_the_whole_path(whole: Path) -> None:
    table = results(whole)["systems"]
    assert set(table) == {"seed", "expert:code", "expert:math", "expert:prose", "dense", "btx"}
    for name, row in table.items():
        domains = [loss for domain, loss in row["loss"].items() if domain != "mean"]
        assert set(row["loss"]) == {"general", "code", "math", "prose", "mean"}, name
        assert row["loss"]["mean"] == pytest.approx(sum(domains) / len(domains))
        assert 0 < row["loss"]["mean"] < 6.24, "no better than chance: ln 512"
    assert table["dense"]["train_tokens"] == table["btx"]["train_tokens"]
    assert table["btx"]["params_total"] > table["btx"]["params_active"] > 0
    assert table["btx"]["params_total"] > table["dense"]["params_total"]
    # The exported Mixtral has been compared by its loss in transformers.
    export = json.loads((whole / "export" / "done.json").read_text())
    assert export["outputs"]["loss"]["difference"] < 1e-4
    assert (whole / "report.html").stat().st_size > 10_000


def test_no_stage_has_a_warning_in_its_log(whole: Path) -> None:
    """Neither of upstream's nor of ours: of a run that met nothing, ranks have nothing to say."""
    logs = {file.parts[-3]: file.read_text() for file in whole.glob("*/log/*.log")}
    assert {"prepare", "mix", "evaluate", "export", *STAGES} <= logs.keys()
    assert {stage: text for stage, text in logs.items() if text} == {}


def test_experts_are_specialists_and_the_mix_is_better_than_each(whole: Path) -> None:
    """What Branch-Train-MiX claims, small as this run is: over five random seeds the experts lead
    their columns by 0.10 nats or more, and the mix all that it is made of by 0.20."""
    table = results(whole)["systems"]
    loss = {name: row["loss"] for name, row in table.items()}
    domains = ("code", "math", "prose")
    for domain in domains:
        best = min(domains, key=lambda name: loss[f"expert:{name}"][domain])
        assert best == domain, f"the {best} expert is better at {domain}"
        assert loss[f"expert:{domain}"][domain] < loss["seed"][domain]
    for name in ("seed", *(f"expert:{domain}" for domain in domains)):
        assert loss["btx"]["mean"] < loss[name]["mean"], name


def test_no_expert_of_the_mix_is_dead(whole: Path) -> None:
    before, after = routing.of_run(whole)
    assert after.moment == "after finetuning"
    assert after.experts == ["code", "math", "prose", "seed"]
    assert len(after.load["math"]) == 2, "layers"
    assert after.dead() == {}
    # The smallest share over five random seeds was 0.16; an even one is 0.25.
    shares = [share for layer in routing.over_domains(after.load) for share in layer]
    assert min(shares) > 0.05


def test_the_export_reads_and_writes_text(whole: Path) -> None:
    """``AutoTokenizer`` gives, on all held-out text of every domain, the ids that were trained on;
    ``generate`` goes on from some of it."""
    transformers = pytest.importorskip("transformers")
    exported, prepared = whole / "export" / "hf", whole / "prepare"
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    for domain in ("general", "code", "math", "prose"):
        lines = (prepared / "corpus" / domain / "valid.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        rows = tokenizer(texts)["input_ids"]
        ids = [number for row in rows for number in (*row, tokenizer.eos_token_id)]
        trained = np.fromfile(prepared / "data" / domain / "valid.bin", dtype=np.uint16)
        assert np.array_equal(ids, trained), domain
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    prompt = tokenizer(texts[0][:80], return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(written[0]).startswith(texts[0][:80])
    assert written.shape[1] > prompt["input_ids"].shape[1]


def test_the_plan_said_what_it_takes_on_the_disk(whole: Path) -> None:
    """Every stage's checkpoint, and all of them, when the run is done."""
    made = run_plan.plan(load_recipe(TINY))
    held = {stage.name: size(whole / stage.name.replace(":", "-")) for stage in made.stages}
    for stage in made.stages:
        assert stage.disk_bytes == pytest.approx(held[stage.name], rel=0.05), stage.name
        assert stage.disk_bytes < stage.checkpoint_bytes < stage.peak_disk_bytes
    assert made.total_disk_bytes == pytest.approx(sum(held.values()), rel=0.05)
    assert made.peak_disk_bytes > made.total_disk_bytes


def size(stage: Path) -> int:
    """Bytes of a stage's checkpoints."""
    files = (path for path in (stage / "checkpoints").rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def test_every_step_is_logged_once(whole: Path) -> None:
    for stage, rows in losses(whole).items():
        assert [step for step, *_ in rows] == list(range(1, len(rows) + 1)), stage


def test_again_all_is_done_at_once(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    process = start(whole.parent.parent)
    output = finish(process)
    assert "done" in output
    after = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert {p for p in before if before[p] != after.get(p)} <= {whole / "lock"}


def test_killed_twenty_times(whole: Path, tmp_path: Path) -> None:
    """kill -9 at twenty seeded moments; what comes out is the undisturbed run.

    Ranks take seconds to start, so that moments drawn from the clock alone would mostly hit
    imports. Each kill draws what to wait for, and then some more time: the start of the command,
    a checkpoint being written, or a training step.
    """
    run_dir = tmp_path / "runs" / "tiny"
    draw = random.Random(20240312)
    moments = ["start"] * 7 + ["save"] * 7 + ["step"] * 6
    draw.shuffle(moments)
    left = iter(moments)
    moment = next(left, None)
    while moment:
        before = time.time()
        process = start(tmp_path)
        if moment == "start":
            time.sleep(draw.uniform(0.1, 3.0))
        elif moment == "save":
            wait_until(lambda since=before: saving(run_dir, since), process)
            time.sleep(draw.uniform(0.0, 0.2))
        else:
            wait_until(lambda since=before: stepped(run_dir, since), process)
            time.sleep(draw.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        assert not orphans(tmp_path), "a process outlived the run"
        if process.returncode == -signal.SIGKILL:
            moment = next(left, None)
        else:  # it was done before its moment came: from the beginning
            assert process.returncode == 0, output
            shutil.rmtree(run_dir)
    finish(start(tmp_path))
    assert losses(run_dir) == losses(whole)
    assert results(run_dir) == results(whole)
    assert not list(run_dir.glob("*/checkpoints/*.partial"))
    assert not list(run_dir.glob("*/**/.*.tmp"))


def saving(run_dir: Path, since: float) -> bool:
    """Whether a checkpoint is being written that was begun after ``since``."""
    return any(newer(path, since) for path in there(run_dir, "*/checkpoints/*.partial"))


def stepped(run_dir: Path, since: float) -> bool:
    """Whether a stage has logged anything after ``since``."""
    return any(newer(path, since) for path in there(run_dir, "*/metrics.jsonl"))


def there(run_dir: Path, pattern: str) -> list[Path]:
    """Of a directory that is written to, where ``Path.glob`` raises if something goes meanwhile."""
    return [run_dir / name for name in glob.glob(pattern, root_dir=run_dir)]


def newer(path: Path, since: float) -> bool:
    """Whether a file is there and has changed after ``since``."""
    try:
        return path.stat().st_mtime > since
    except FileNotFoundError:
        return False


def wait_until(condition: Any, process: subprocess.Popen[str], timeout: float = 600) -> None:
    """Until a condition holds, the process ends, or the time is over."""
    deadline = time.monotonic() + timeout
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def orphans(directory: Path, patience: float = 600) -> list[psutil.Process]:
    """Processes at work in a directory, once those that are being ended have had their time."""
    deadline = time.monotonic() + patience
    while True:
        found = [p for p in psutil.process_iter() if _works_in(p, directory)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _works_in(process: psutil.Process, directory: Path) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.cwd().startswith(str(directory))
    except psutil.Error:
        return False


def test_ctrl_c_saves_and_goes_on(whole: Path, tmp_path: Path) -> None:
    log = tmp_path / "runs" / "tiny" / "seed" / "metrics.jsonl"
    while True:
        process = start(tmp_path)
        wait_for(lambda: log.exists() and len(read(log)) > 3, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=600)
        if not (log.parent / "done.json").exists():
            break
        shutil.rmtree(tmp_path / "runs")  # it was done before its moment came: from the beginning
    assert process.returncode == 130, output
    assert "again" in output
    assert not orphans(tmp_path)
    stopped = json.loads((log.parent / "stopped.json").read_text())
    saved = log.parent / "checkpoints"
    assert (saved / f"step_{stopped['step']:08d}" / "manifest.json").exists()
    seed = run_plan.plan(load_recipe(TINY)).stages[0]  # these are made to go on, with the optimizer
    whole_ones = len(list(saved.iterdir())) * seed.checkpoint_bytes
    assert whole_ones == pytest.approx(size(log.parent), rel=0.05)
    finish(start(tmp_path, "--stop-after", "seed"))
    resumed = [r for r in read(log) if r["kind"] == "train"]
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in resumed] == losses(whole)["seed"]


def wait_for(condition: Any, process: subprocess.Popen[str], timeout: float = 600) -> None:
    """Until a condition holds; fails where the process ends before."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_resolved_recipe_is_kept(whole: Path) -> None:
    kept = yaml.safe_load((whole / "recipe.yaml").read_text())
    assert kept["model"]["hidden_size"] == 32
