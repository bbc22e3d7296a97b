"""What a person sees of a running stage."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_btx.files import ProgressFile, append_line
from megatron_btx.pipeline.local.progress import StageProgress
from megatron_btx.recipe.messages import amount, clock
from tests.pipeline.conftest import ROOT, Run


def _write(path: Path, records: list[dict[str, object]]) -> None:
    path.with_name("new").write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(path.with_name("new"), path)


def _steps(first: int, last: int) -> list[dict[str, object]]:
    return [
        {"kind": "train", "step": s, "loss": 3.0, "tokens_per_second": 12345.6, "time": 100.0 + s}
        for s in range(first, last + 1)
    ]


def test_steps_follow_what_came_before_them(tmp_path: Path) -> None:
    """One that is kept, as a run's display keeps it: routers are computed, then trained."""
    progress, seen = ProgressFile(tmp_path / "progress.json"), StageProgress(tmp_path)
    progress("centroids of the routers,", 0.4)
    assert seen.read().words == "centroids of the routers, 40%"
    progress.forget()
    start = {"kind": "start", "step": 0, "total_steps": 100, "time": 100.0}
    _write(tmp_path / "metrics.jsonl", [start, *_steps(1, 40)])
    assert seen.read().words.startswith("step 40/100")


def test_standing_follows_the_metrics(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    standing = StageProgress(tmp_path)
    assert standing.read().words == "starting"
    start = {"kind": "start", "step": 0, "total_steps": 100}
    _write(file, [start, *_steps(1, 40)])
    assert standing.read().words == "step 40/100  loss 3.000  12.3k tokens/s  1:00 left"
    with file.open("a") as stream:
        stream.write(json.dumps(_steps(41, 41)[0])[:20])
    assert standing.read().done == 40  # a line that is being written
    _write(file, [start, *_steps(1, 30), {**start, "step": 30}, *_steps(31, 33)])
    assert standing.read().done == 33  # resumed: the file was cut and replaced


def test_a_second_attempt_is_starting_until_it_says_more(tmp_path: Path) -> None:
    """What the first has left in the log is not its own."""
    standing = StageProgress(tmp_path)
    start = {"kind": "start", "step": 0, "total_steps": 100, "time": 60.0}
    append_line(tmp_path / "attempts.jsonl", {"attempt": 1, "time": 50.0})
    assert standing.read().words == "starting"
    start = {"kind": "start", "step": 0, "total_steps": 100, "time": 100.0}
    _write(tmp_path / "metrics.jsonl", [start, *_steps(1, 40)])
    assert standing.read().words.startswith("step 40/100")
    append_line(tmp_path / "attempts.jsonl", {"attempt": 2, "time": 500.0})
    assert standing.read().words == StageProgress(tmp_path).read().words == "starting"
    again = {**start, "step": 40, "time": 510.0}
    _write(tmp_path / "metrics.jsonl", [start, *_steps(1, 40), again])
    assert standing.read().words.startswith("step 40/100")


def test_standing_of_what_has_no_steps(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text(json.dumps({"what": "tokenizing math", "done": 0.25}))
    assert StageProgress(tmp_path).read().words == "tokenizing math 25%"


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0:00"), (7.4, "0:07"), (750, "12:30"), (11110, "3:05:10")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (950, "950"), (12345, "12.3k"), (533e9, "533B")]
)
def test_amount(number: float, text: str) -> None:
    assert amount(number) == text


def test_bars_on_a_terminal(run: Run) -> None:
    """The whole command under a real terminal: bars while it runs, one line for what is done."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tests.pipeline.fake_btx", "run", str(run.recipe)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm-256color",
        "COLUMNS": "120",
        "BTX_FAKE": json.dumps({"seed": {"hold": 5}}),
        "BTX_TEST_RUN": str(run.directory),
    }
    process = subprocess.Popen(
        [*command, "--stop-after", "seed"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        cwd=run.directory,
    )
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + 600
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the terminal's other side is closed
                break
        if b"/20  loss" in seen:
            (run.run_dir / "go").touch()
    os.close(ours)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) == 0
    text = seen.decode()
    assert "━" in text
    assert "/20  loss" in text
    assert re.search(r"seed done in \d+:\d\d", text)
    assert "loss 0.200" in text  # the last step's
