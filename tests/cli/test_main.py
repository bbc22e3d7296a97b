"""``btx`` as a user meets it: help, errors, exit codes, pipes."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_btx import __version__
from megatron_btx.cli.main import _COMMANDS, _parser, main
from megatron_btx.cli.model_flags import counted, data_of, layout_of
from megatron_btx.errors import UserError
from megatron_btx.pipeline import state
from tests.bad import Bad, Commands
from tests.report.made import make_run
from tests.small import btx, write_small

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny" / "recipe.yaml"


def _btx(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_btx.cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def _help(*command: str) -> str:
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(io.StringIO()) as said:
        main([*command, "--help"])
    assert ended.value.code == 0
    return said.getvalue()


COMMANDS = re.findall(r"^    (\w+)\b", _help().partition("commands:")[2], re.MULTILINE)


def test_all_commands_are_found() -> None:
    """Each by itself too, where its module alone is imported: see the next test."""
    assert set(COMMANDS) >= {"run", "plan", "mix", "verify", "compare", "centroids", "submit"}
    assert [name for names in _COMMANDS.values() for name in names] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_described_and_shows_examples(command: str) -> None:
    usage, description, *_ = _help(command).split("\n\n")
    assert description[0].isupper(), "a sentence about what it does comes first"
    assert description.endswith(".")
    assert f"btx {command} " in _help(command).partition("example")[2]
    if command in ("run", "plan", "report", "stage", "submit", "status", "logs", "cancel"):
        assert usage.split()[:2] == ["usage:", "btx"]
        assert " RECIPE" in usage


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "x", "--tokens", "abc"], "--tokens: 'abc' is no whole number"),
        (["run"], "btx run: the following arguments are required: RECIPE"),
        (["mix", "--method", "btz"], "--method: invalid choice: 'btz'"),
        (["generate", "x", "--prompt"], "--prompt: expected one argument"),
    ],
)
def test_a_flags_mistake_is_an_error_like_any_other(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {said}")
    assert told.endswith(f"  fix: see btx {words[0]} --help\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"megatron-btx {__version__}"


def test_dry_run_prints_the_graph_and_changes_nothing(tmp_path: Path) -> None:
    done = _btx("run", TINY, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == [
        "prepare",
        "seed",
        "expert:code",
        "expert:math",
    ]
    assert "after prepare, seed" in lines[2]
    assert list(tmp_path.iterdir()) == []
    stages = json.loads(_btx("run", TINY, "--dry-run", "--json", cwd=tmp_path).stdout)["stages"]
    assert {stage["state"] for stage in stages} == {"not started"}


@pytest.mark.parametrize(
    ("recipe", "arguments", "words"),
    [
        (None, ["run"], "recipe.yaml"),
        ("model: {num_layers: 2", ["run"], "recipe.yaml"),
        (f"base: {TINY}\nsed: {{}}\n", ["run"], "seed"),
        (f"base: {TINY}\nsed: {{}}\n", ["report"], "seed"),
        (f"base: {TINY}\n", ["report"], "nothing has been run"),
        (f"base: {TINY}\n", ["run", "--stop-after", "mux"], "there is no stage mux"),
        (f"base: {TINY}\n", ["export", "--out", "x"], "is no run: it holds no recipe.yaml"),
        (f"base: {TINY}\n", ["stage", "mox"], "is not a stage of this recipe"),
        (f"base: {TINY}\n", ["stage", "seed"], "needs prepare first"),
        (f"base: {TINY}\n", ["stage", "finetune"], "2 rank(s), 1 were started"),
        (f"base: {TINY}\nseed: {{from: nowhere}}\n", ["run"], "nowhere does not exist"),
        (
            f"base: {TINY}\ndomains: {{math: {{builtin: null, train: no.jsonl, valid: x.jsonl}}}}",
            ["run"],
            "no.jsonl does not exist",
        ),
    ],
)
def test_a_mistake_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, recipe: str | None, arguments: list[str], words: str
) -> None:
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
    before = sorted(tmp_path.rglob("*"))
    done = _btx(arguments[0], "recipe.yaml", *arguments[1:], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "mix --top-k 2",
            "--top-k: is not a flag of btx mix\n  fix: did you mean --moe-router-topk?",
        ),
        (
            "generate A --max-tokens=3",
            "--max-tokens: is not a flag of btx generate\n  fix: did you me",
        ),
        ("run r.yaml --xyz", "--xyz: is not a flag of btx run\n  fix: see btx run --help"),
        ("generate A B", "B: is a word too many for btx generate\n  fix: repeat its flag before"),
        ("rnu r.yaml", "rnu: is not a command of btx\n  fix: did you mean `btx run`? see btx"),
        ("zzz", "zzz: is not a command of btx\n  fix: see btx --help"),
        ("convert megatron-lm-args A --x", "--x: is not a flag of btx convert megatron-lm-args"),
    ],
)
def test_what_a_command_does_not_take(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    assert f"error: {said}" in capsys.readouterr().err


def test_a_stage_that_printed_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its losses are elsewhere; one that has not begun has no log yet."""
    (tmp_path / "recipe.yaml").write_text(f"base: {TINY}\nrun_dir: {tmp_path / 'run'}\n")
    words = ["logs", str(tmp_path / "recipe.yaml"), "seed"]
    assert main(words) == 2
    assert "seed: has no log yet" in capsys.readouterr().err
    (tmp_path / "run" / "seed" / "log").mkdir(parents=True)
    state.begin(tmp_path / "run" / "seed", 1, 1)
    losses = tmp_path / "run" / "seed" / "metrics.jsonl"
    losses.touch()
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "seed has printed nothing: a log holds warnings and errors alone" in said
    assert f"step by step, are in {losses}" in said


def test_old_names_of_flags_are_read_with_a_hint(tmp_path: Path) -> None:
    write_small(tmp_path)
    for flag in ("--stop-after", "--until"):
        done = _btx("run", "recipe.yaml", "--dry-run", flag, "expert:math", cwd=tmp_path)
        names = [line.split()[0] for line in done.stdout.splitlines()]
        assert names[:3] == ["prepare", "seed", "expert:math"]
        hint = "hint: --until is now called --stop-after" in done.stderr
        assert hint == (flag == "--until")
    options = _parser().parse_args(["generate", "M", "--until", ";", "--stop", "."])
    assert options.stop == [";", "."]
    options = _parser().parse_args(["evaluate", "M", "--shots", "3"])
    assert options.num_fewshot == 3


def test_counts_are_written_as_in_recipes() -> None:
    for text, value in (("4096", 4096), ("60k", 60_000), ("1e6", 1_000_000), ("1.5M", 1_500_000)):
        assert counted(text) == value
    for text in ("1.5", "k", "many", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number"):
            counted(text)


@pytest.mark.parametrize("entry", ["code=", "code={here},", "code=,{here}", "code={here},,{here}"])
def test_no_file_is_not_the_current_directory(entry: str, tmp_path: Path) -> None:
    assert data_of([f"code={tmp_path}"]) == {"code": [str(tmp_path)]}
    with pytest.raises(UserError, match="--data code: code=.* has an empty file name"):
        data_of([entry.format(here=tmp_path)])


def test_a_file_that_is_there_is_one_whatever_its_name(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a,b.jsonl", "a", "b.jsonl")]
    for file in files:
        file.touch()
    assert data_of([f"x={files[0]}"]) == {"x": [str(files[0])]}
    assert data_of([f"x={files[1]},{files[2]}"]) == {"x": [str(files[1]), str(files[2])]}


@pytest.mark.parametrize("words", [["evaluate", "a", "--data", "x=y"], ["plan", "x"], ["--help"]])
def test_a_current_directory_that_is_gone(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Libraries would end the process in words of their own. Help is given all the same."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    if words == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            main(words)
        return
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the current directory: no longer exists")
    assert "fix: cd to another one" in said


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("data_parallel_size=" + "9" * 5000, r"5,019 characters\) .* is not a positive number"),
        ("data_parallel_size=1000000000", "--layout data_parallel_size: is 1000000000, out of"),
        (
            "virtual_pipeline_model_parallel_size=1",
            "virtual_pipeline_model_parallel_size: is 1, out",
        ),
        ("num_threads=0", "num_threads=0 is not a positive number"),
        ("sequence_parallel=1", "sequence_parallel is not a key of a layout"),
    ],
)
def test_a_layout_on_the_command_line_has_the_ranges_of_a_recipe(word: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        layout_of([word])


def test_stages_by_hand(tmp_path: Path) -> None:
    """One rank needs nothing in its environment, as `btx stage --help` says."""
    write_small(tmp_path)
    for stage in ("prepare", "seed"):
        done = btx("stage", "recipe.yaml", stage, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "runs" / "small" / stage / "done.json").exists()


def test_report_prints_the_table_and_writes_the_page(tmp_path: Path) -> None:
    _, run_dir = make_run(tmp_path)
    done = _btx("report", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Branch-Train-MiX is ahead of the dense baseline" in done.stdout
    assert (run_dir / "report.html").stat().st_size > 50_000
    table = json.loads(_btx("report", "recipe.yaml", "--json", cwd=tmp_path).stdout)
    assert set(table["systems"]) >= {"seed", "dense", "btx"}


def test_a_report_shows_no_other_recipes_results(tmp_path: Path) -> None:
    _, run_dir = make_run(tmp_path)
    text = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "other.yaml").write_text(f"{text}finetune: {{lr: 1e-4}}\n")
    done = _btx("report", "other.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no results yet: results.json is of another recipe")
    assert "Branch-Train-MiX is ahead" not in (run_dir / "report.html").read_text()
    assert _btx("report", "other.yaml", "--json", cwd=tmp_path).returncode == 2
    assert "Branch-Train-MiX is ahead" in _btx("report", "recipe.yaml", cwd=tmp_path).stdout
    assert "Branch-Train-MiX is ahead" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (None, ["--json"], "runs/small: has no results yet\n  fix: btx run recipe.yaml"),
        ("{}", [], "results.json: is damaged: it holds no systems\n  fix: remove it and "),
        ('{"systems"', ["--json"], "results.json: is damaged"),
    ],
)
def test_a_report_of_no_results(
    content: str | None, arguments: list[str], words: str, small: Commands
) -> None:
    run_dir = small.directory / "runs" / "small"
    run_dir.mkdir(parents=True)
    if content is not None:
        (run_dir / "results.json").write_text(content)
    small.refuse(Bad("results", lambda _: None, (words,), ("report", "recipe.yaml", *arguments)))


def test_a_closed_pipe_is_no_crash(tmp_path: Path) -> None:
    make_run(tmp_path)
    command = f"{sys.executable} -m megatron_btx.cli report recipe.yaml --json"
    line = f"set -o pipefail; {command} | true"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode in (0, 141)
    assert done.stderr == ""


IMPORTING = """
import sys
from megatron_btx.cli.main import interruptible
with interruptible(once=True):
    try:
        import slow
    except BaseException:
        print("taken for a module that is missing")
"""


def test_an_interrupt_in_an_import_is_lost_nowhere(tmp_path: Path) -> None:
    """Where libraries take any exception for a missing module of theirs, and go on without it."""
    kill = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(9): pass\n"
    (tmp_path / "slow.py").write_text(kill)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(("arguments", "code"), [(f"plan {TINY}", 0), ("plan nope.yaml", 2)])
def test_closed_streams_are_no_crash(tmp_path: Path, arguments: str, code: int) -> None:
    """As a daemon starts commands. What is opened first must not get the number of one of them."""
    words = f"{sys.executable} -m megatron_btx.cli {arguments}"
    script = f"{words} <&- >&- 2>&-; echo $? > code"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(["sh", "-c", script], cwd=tmp_path, env=environment, check=True, timeout=600)
    assert (tmp_path / "code").read_text() == f"{code}\n"
