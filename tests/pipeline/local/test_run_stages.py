"""The local runner, with real processes: what it leaves behind, whatever happens to it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
from pathlib import Path

import psutil
import pytest

from megatron_btx.cli.main import main
from megatron_btx.pipeline.local import run_stages
from tests.pipeline.conftest import TINY, Run

ALL = "prepare seed expert:code expert:math expert:prose mix finetune dense evaluate export report"


def _attempts(path: Path) -> int:
    return len(list((path / "log").glob("attempt-*.log")))


def _tree(path: Path) -> dict[str, bytes]:
    files = [item for item in sorted(path.rglob("*")) if item.is_file()]
    return {str(item.relative_to(path)): item.read_bytes() for item in files}


def test_all_stages_once_and_then_all_is_done(run: Run) -> None:
    code, output, errors = run("--json")
    assert output, errors
    outcome = json.loads(output)
    assert (code, outcome["code"]) == (0, 0), errors
    assert [stage["name"] for stage in outcome["stages"]] == ALL.split()
    assert {stage["state"] for stage in outcome["stages"]} == {"done"}
    before = _tree(run.run_dir)
    (run.directory / "torch.py").write_text("import os\nos._exit(9)  # at once, so without it\n")
    code, output, errors = run()
    assert code == 0, errors
    assert "all 11 stages are done" in output
    assert _tree(run.run_dir) == before


SIDE_BY_SIDE = pytest.mark.skipif(run_stages.cores() < 2, reason="one core")


@SIDE_BY_SIDE
def test_independent_stages_share_the_cores(run: Run) -> None:
    process = run.start(wish={f"expert:{n}": {"hold": 2} for n in ("code", "math", "prose")})
    alive = [run.run_dir / f"expert-{name}" for name in ("code", "math", "prose")]
    run.wait(lambda: sum((path / "metrics.jsonl").exists() for path in alive) >= 2)
    assert len(run.commands("tests.pipeline.fake_worker")) >= 2
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=600)


def test_until_a_stage_and_then_the_rest(run: Run) -> None:
    code, _, errors = run("--stop-after", "expert:math")
    assert code == 0
    done = {path.parent.name for path in run.run_dir.glob("*/done.json")}
    assert done == {"prepare", "seed", "expert-math"}
    code, output, errors = run("--stop-after", "export")
    assert code == 0
    assert _attempts(run.run_dir / "seed") == 1
    assert not (run.run_dir / "dense").exists()
    assert run("--stop-after", "mux")[0] == 2


def test_kill_9_leaves_no_process_and_the_next_run_goes_on(run: Run) -> None:
    process = run.start(wish={"seed": {"hold": 2, "child": True}})
    run.wait(lambda: len(run.steps("seed")) >= 2)
    assert run.commands("sleep")  # a grandchild in its own session
    process.send_signal(signal.SIGKILL)
    process.wait()
    run.wait(lambda: not run.processes())
    reached = max(run.steps("seed"))
    code, _, errors = run("--stop-after", "seed")
    assert code == 0, errors
    assert "attempt 2" in errors
    assert run.steps("seed")[-1] == 20
    assert min(run.steps("seed")[reached:]) >= reached  # went on, did not begin anew
    assert _attempts(run.run_dir / "seed") == 2


def test_a_rank_killed_with_its_watcher_still_leaves_nothing(run: Run) -> None:
    """The kernel's own net: run and watcher both die, the ranks go with them."""
    process = run.start(wish={"seed": {"hold": 2}})
    run.wait(lambda: len(run.steps("seed")) >= 1)
    for other in run.processes():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile, and is a zombie or gone
            if "tests.pipeline.fake_worker" not in other.cmdline():
                other.kill()
    process.wait()
    run.wait(lambda: not run.processes())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_lets_the_ranks_save(run: Run, number: int) -> None:
    process = run.start(wish={"seed": {"hold": 2, "child": True}})
    run.wait(lambda: len(run.steps("seed")) >= 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "run again to continue: btx run" in errors
    assert (run.run_dir / "seed" / "stopped.json").exists()
    assert not (run.run_dir / "seed" / "done.json").exists()
    assert not run.processes()
    code, _, errors = run("--stop-after", "seed")
    assert code == 0
    assert run.steps("seed") == list(range(1, 21))
    assert not (run.run_dir / "seed" / "stopped.json").exists()


def test_the_way_on_can_be_pasted_into_a_shell(run: Run) -> None:
    run.recipe = run.recipe.rename(run.directory / "my recipe.yaml")
    process = run.start(wish={"seed": {"hold": 2}})
    run.wait(lambda: len(run.steps("seed")) >= 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    line = next(line for line in errors.splitlines() if "run again" in line)
    assert shlex.split(line.partition("to continue: ")[2]) == ["btx", "run", str(run.recipe)]


def test_a_second_ctrl_c_does_not_wait(run: Run) -> None:
    process = run.start(wish={"seed": {"hold": 1, "deaf": True}})
    run.wait(lambda: len(run.steps("seed")) >= 1)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert any("Ctrl-C again: stop at once" in line for line in process.stderr)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=600)
    assert process.returncode == 130
    assert not run.processes()


@SIDE_BY_SIDE
def test_a_crash_shows_the_log_and_stops_the_others_politely(run: Run) -> None:
    wish = {
        "expert:code": {"fail": "crash", "after": "dense"},
        "expert:math": {"hold": 2},
        "expert:prose": {"hold": 2},
        "dense": {"hold": 2},
    }
    code, _, errors = run(wish=wish)
    assert code == 1
    assert "expert:code failed (attempt 1): RuntimeError: a crash, as asked" in errors
    assert "Traceback" in errors
    assert str(run.run_dir / "expert-code" / "log" / "attempt-1.log") in errors
    assert (run.run_dir / "dense" / "stopped.json").exists()
    code, _, errors = run("--stop-after", "expert:code")
    assert code == 0
    assert _attempts(run.run_dir / "expert-code") == 2


def test_one_failing_rank_takes_the_stage_with_it(run: Run) -> None:
    wish = {"finetune": {"fail": "crash", "seconds": 600}}  # rank 1 of 2; rank 0 would go on
    code, _, errors = run("--stop-after", "finetune", wish=wish)
    assert code == 1
    assert "finetune failed" in errors


def test_ranks_that_say_nothing(run: Run) -> None:
    code, _, errors = run("--stop-after", "prepare", wish={"prepare": {"fail": "exit"}})
    assert code == 1
    assert "rank 0 ended with exit code 3" in errors


def test_a_mistake_in_the_input_leaves_nothing_behind(run: Run) -> None:
    before = _tree(run.directory)
    code, output, errors = run(wish={"prepare": {"fail": "user"}})
    assert code == 2
    assert "error: corpus.jsonl: line 3: is not an object with `text`\n  fix: mend it" in errors
    assert "Traceback" not in errors
    assert output == ""
    assert _tree(run.directory) == before
    assert not run.run_dir.exists()


def test_a_mistake_later_keeps_what_is_done(run: Run) -> None:
    assert run("--stop-after", "seed")[0] == 0
    before = _tree(run.run_dir)
    code, _, _ = run("--stop-after", "expert:code", wish={"expert:code": {"fail": "user"}})
    assert code == 2
    assert _tree(run.run_dir) == before


def _checkpoints(run: Run, *stages: str) -> list[bool]:
    return [bool(list((run.run_dir / s / "checkpoints").glob("step_*"))) for s in stages]


def test_a_full_disk_takes_no_checkpoint_with_it(run: Run) -> None:
    """The seed has saved twice when it fails by something that a user can put right."""
    assert run("--stop-after", "prepare")[0] == 0
    wish = {"seed": {"fail": "full", "save": 5, "seconds": 1}}
    code, _, errors = run("--stop-after", "seed", wish=wish)
    assert code == 2
    assert "no space left" in errors
    assert _checkpoints(run, "seed") == [True]
    code, _, errors = run("--stop-after", "seed")
    assert code == 0, errors
    assert "attempt 2" in errors
    assert run.steps("seed") == [*range(1, 11), *range(11, 21)]  # went on


@SIDE_BY_SIDE
def test_a_stage_stopped_by_anothers_failure_stays(run: Run) -> None:
    assert run("--stop-after", "seed")[0] == 0
    wish = {
        "expert:code": {"fail": "user", "after": "dense"},
        "dense": {"hold": 2},
    }
    code, _, errors = run(wish=wish)
    assert code == 2, errors
    assert (run.run_dir / "dense" / "stopped.json").exists()
    assert run("--stop-after", "evaluate")[0] == 0
    assert run.steps("dense") == list(range(1, 21))


@pytest.mark.parametrize("save", [0, 5])
def test_what_was_set_aside_outlives_a_mistake(run: Run, save: int) -> None:
    """A changed stage that fails with nothing saved leaves all as it was; one that has saved
    something stays, and the former one in ``old/``."""
    assert run("--stop-after", "expert:math")[0] == 0
    run.recipe.write_text(run.recipe.read_text() + "experts:\n  math: {lr: 5e-4}\n")
    before = _tree(run.run_dir)
    wish = {"expert:math": {"fail": "full", "save": save, "seconds": 1}}
    code, _, errors = run("--stop-after", "expert:math", wish=wish)
    assert code == 2
    if save:
        assert list(run.run_dir.glob("old/expert-math-*/done.json"))
        assert _checkpoints(run, "expert-math") == [True]
    else:
        assert "is back in its place" in errors
        assert _tree(run.run_dir) == before
        assert not (run.run_dir / "old").exists()


def test_a_closed_terminal_lets_the_ranks_save(run: Run) -> None:
    """Its hang-up is one wish to stop; that nothing can be said there any more is no second."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tests.pipeline.fake_btx", "run", str(run.recipe)]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=run.environment({"seed": {"hold": 2}}) | {"TERM": "xterm"},
        cwd=run.directory,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    run.wait(lambda: len(run.steps("seed")) >= 2)
    os.close(ours)
    assert process.wait(timeout=600) == 130
    assert (run.run_dir / "seed" / "stopped.json").exists()
    assert not run.processes()


def test_two_runs_of_one_recipe(run: Run) -> None:
    first = run.start(wish={"seed": {"hold": 2}})
    run.wait(lambda: len(run.steps("seed")) >= 1)
    code, _, errors = run()
    assert code == 2
    assert f"another btx is at work in it (process {first.pid} on " in errors
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=600)
    assert run("--stop-after", "seed")[0] == 0


def test_a_changed_recipe_keeps_the_former_stage_and_takes_it_back(run: Run) -> None:
    assert run("--stop-after", "expert:math")[0] == 0
    former = run.recipe.read_text()
    seed = (run.run_dir / "seed" / "done.json").read_bytes()
    run.recipe.write_text(former + "experts:\n  math: {lr: 5e-4}\n")
    code, _, errors = run("--stop-after", "expert:math")
    assert code == 0, errors
    assert "its part of the recipe has changed" in errors
    assert (run.run_dir / "seed" / "done.json").read_bytes() == seed
    run.recipe.write_text(former)
    code, _, errors = run("--stop-after", "expert:math")
    assert code == 0
    assert "taken back" in errors
    assert _attempts(run.run_dir / "expert-math") == 1


def test_what_somebody_else_puts_there_stays(run: Run) -> None:
    """A run that fails before it has made anything removes what it made, and nothing else."""
    wish = {"prepare": {"fail": "user", "after": "go"}}
    process = run.start("--stop-after", "prepare", wish=wish)
    run.wait(lambda: (run.run_dir / "prepare" / "log").exists())
    (run.run_dir / "notes.md").write_text("mine")
    (run.run_dir / "go").mkdir()
    (run.run_dir / "go" / "metrics.jsonl").touch()
    process.communicate(timeout=600)
    assert process.returncode == 2
    assert sorted(path.name for path in run.run_dir.iterdir()) == ["go", "notes.md"]


@pytest.mark.parametrize("name", ["recipe.yaml", "other.yaml"])
def test_a_recipe_in_the_runs_directory_is_never_overwritten(run: Run, name: str) -> None:
    """Neither the recipe itself (`run_dir: "."`), nor somebody's file of that name."""
    text = run.recipe.read_text().replace(str(run.run_dir), str(run.directory))
    run.recipe.write_text(text)
    (run.directory / name).write_text(text)
    mine, run.recipe = run.recipe, run.directory / name
    before = _tree(run.directory)
    for options in ((), ("--dry-run",)):
        code, _, errors = run(*options)
        assert code == 2
        assert f"{mine}: " in errors
        assert "give another `run_dir:`" in errors
    assert _tree(run.directory) == before


def test_the_copy_of_the_recipe_can_be_run(run: Run) -> None:
    assert run("--stop-after", "prepare")[0] == 0
    run.recipe = run.run_dir / "recipe.yaml"
    assert run("--stop-after", "seed")[0] == 0


def test_more_ranks_than_a_machine_holds_are_refused(run: Run) -> None:
    layout = "{data_parallel_size: 1000}"
    more = f"seed: {{layout: {layout}, micro_batch_size: 1, global_batch_size: 1000}}\n"
    run.recipe.write_text(run.recipe.read_text() + more)
    code, _, errors = run("--stop-after", "seed")
    assert code == 2
    assert "seed.layout: TP x PP x CP x DP is 1000 ranks, and this machine has" in errors
    assert not run.run_dir.exists()


def test_more_ranks_than_cores_are_one_warning(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one core, of the stages of two ranks; no GPU runs them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        code, _, errors = run(wish={"prepare": {"fail": "user"}})
    finally:
        os.sched_setaffinity(0, cores)
    assert code == 2
    words = "more ranks x threads than the 1 core of this machine"
    (warning,) = (line for line in errors.splitlines() if words in line)
    assert warning.startswith("warning: ")
    assert "finetune (2 x 1)" in warning
    assert "seed" not in warning


def test_a_finished_stage_without_its_checkpoint_is_told_at_once(run: Run) -> None:
    assert run("--stop-after", "seed")[0] == 0
    (run.run_dir / "seed" / "checkpoints" / "step_00000020").rmdir()
    code, _, errors = run("--stop-after", "expert:math")
    assert code == 2
    assert (
        f"{run.run_dir / 'seed'}: is a finished stage, and holds no checkpoint any more" in errors
    )
    (run.run_dir / "seed" / "done.json").unlink()  # as the error says
    code, _, errors = run("--stop-after", "expert:math")
    assert code == 0, errors


def test_a_dry_run_says_why_a_stage_is_left(run: Run) -> None:
    assert run("--stop-after", "expert:math")[0] == 0
    assert run("--stop-after", "expert:code", wish={"expert:code": {"fail": "crash"}})[0] == 1
    run.recipe.write_text(run.recipe.read_text() + "experts: {math: {lr: 1e-3}}\n")
    code, output, _ = run("--dry-run")
    assert code == 0
    lines = output.splitlines()
    why = {line.split()[0]: after.strip() for line, after in zip(lines, lines[1:], strict=False)}
    assert why["expert:code"] == "RuntimeError: a crash, as asked"
    words = {line.split("  ")[0]: line for line in lines}
    assert "  failed  " in words["expert:code"]
    assert "  out of date  " in words["expert:math"]
    assert why["expert:math"].startswith("its part of the recipe, its text")
    assert "  not started  " in words["expert:prose"]


def test_a_dry_run_says_what_will_be_taken(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a run that ``share:`` names, where it was not begun here; ``btx compare`` says the
    same, and shares among its runs without being told."""
    assert run("--stop-after", "seed")[0] == 0
    monkeypatch.chdir(run.directory)
    Path("second.yaml").write_text(f"base: {TINY}\nrun_dir: second\nshare: run\n")
    Path("third.yaml").write_text(f"base: {TINY}\nname: third\nrun_dir: third\n")
    Path("second/seed").mkdir(parents=True)
    for begun in (True, False):
        if not begun:
            Path("second/seed").rmdir()
        assert main(["run", "second.yaml", "--dry-run", "--json"]) == 0
        stages = {one["name"]: one for one in json.loads(capsys.readouterr().out)["stages"]}
        assert stages["prepare"]["why"] == "from run/prepare"
        states = [stages[name]["state"] for name in ("prepare", "seed", "expert:code")]
        assert states == ["shared", "not started" if begun else "shared", "not started"]
        assert main(["compare", "second.yaml", "--dry-run"]) == 0
        seed = "seed not started" if begun else "seed from run/seed"
        said = capsys.readouterr().out
        assert f"prepare from run/prepare, {seed}, expert:code not started" in said
    assert not any(Path("second").iterdir())
    assert main(["compare", "third.yaml", "recipe.yaml", "--dry-run"]) == 0
    assert "prepare from run/prepare, seed from run/seed, expert:co" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "submit", "compare"])
def test_a_dry_run_looks_at_files(run: Run, command: str) -> None:
    more = "seed: {from: meta-llama/Llama-3.1-8B}\ntokenizer: {path: tokenizer.model}\n"
    run.recipe.write_text(run.recipe.read_text() + more)
    words = [sys.executable, "-m", "megatron_btx.cli", command, str(run.recipe), "--dry-run"]
    done = subprocess.run(words, cwd=run.directory, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "hf download meta-llama/Llama-3.1-8B --local-dir" in done.stderr
    assert f"tokenizer.path: {run.directory / 'tokenizer.model'} does not exist" in done.stderr
    assert "finetune" in done.stdout


def test_a_run_s_directory_stands_for_its_recipe(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--stop-after", "seed")[0] == 0
    (run.run_dir / "seed" / "log" / "attempt-1.log").write_text("what a rank says\n")
    for words in ("plan", "status", "logs seed", "run --dry-run", "submit --dry-run"):
        command, *more = words.split()
        told = []
        for given in (run.recipe, run.run_dir):
            assert main([command, str(given), *more]) == 0
            told.append(capsys.readouterr().out)
        assert told[0] == told[1], words
    (run.directory / "other.yaml").write_text(run.recipe.read_text())
    for folder, said in ((run.directory, "has 2 recipes in it"), (run.run_dir / "seed", "has no")):
        assert main(["logs", str(folder), "seed"]) == 2
        assert said in capsys.readouterr().err


def test_status_of_a_local_run_needs_no_slurm(run: Run) -> None:
    assert run("--stop-after", "seed")[0] == 0
    (run.directory / "bin").mkdir()
    squeue = run.directory / "bin" / "squeue"
    squeue.write_text("#!/bin/sh\necho 'Unable to contact slurm controller: DNS' >&2\nexit 1\n")
    squeue.chmod(0o755)
    words = [sys.executable, "-m", "megatron_btx.cli", "status", str(run.recipe)]
    environment = {**os.environ, "PATH": f"{squeue.parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^seed +done", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        ("0,1", ["0", "1"]),
        ("GPU-5f3a, GPU-77", ["GPU-5f3a", "GPU-77"]),
        ("MIG-9c,MIG-10", ["MIG-9c"]),
        ("2,-1,3", ["2"]),
        ("", []),
        ("NoDevFiles", []),
    ],
)
def test_the_gpus_that_are_visible(
    monkeypatch: pytest.MonkeyPatch, visible: str, found: list[str]
) -> None:
    """As CUDA reads the variable: what follows an entry that is no GPU is not visible."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert run_stages.gpus() == found
