"""Why a stage ended, from logs as Slurm 22.05 and torch write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_btx.pipeline.slurm.cause import cause
from megatron_btx.pipeline.slurm.commands import SlurmJob

TRACEBACK = """\
0: Traceback (most recent call last):
0:   File "step.py", line 3, in step
0: ValueError: hidden_dropout is 2.0
"""
EXITED = "srun: error: n1: task 0: Exited with exit code 2\n"
KILLED = "srun: error: n1: task 1: Killed\n"
LOST = "1: RuntimeError: Connection closed by peer [127.0.0.1]:4711\n"
OOM = "slurmstepd: error: Detected 1 oom_kill event in StepId=5.1. Some of the step tasks died.\n"


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (TRACEBACK + EXITED, "0: ValueError: hidden_dropout is 2.0"),
        (f"0: a warning\n{EXITED}", "0: a warning"),
        (EXITED, EXITED.strip()),
        (LOST + KILLED + EXITED, "srun: error: n1: task 1: Killed (out of memory?)"),
        (OOM + "srun: error: n1: task 1: Out Of Memory\n" + LOST, OOM.strip()),
        ("srun: error: n2: tasks 0-3: Segmentation fault (core dumped)\n", "Segmentation fault"),
        (f"error: seed: needs prepare first\n  fix: submit it\n{EXITED}", "needs prepare first"),
        ("", ""),
    ],
)
def test_the_line_that_tells_it(tmp_path: Path, log: str, words: str) -> None:
    (tmp_path / "log").write_text(log)
    found = cause(tmp_path, None, tmp_path / "log")
    assert words in found
    assert bool(words) == bool(found)


def test_error_json_goes_before_the_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOST + EXITED)
    (tmp_path / "error.json").write_text(json.dumps({"kind": "user", "message": "key: is wrong"}))
    assert cause(tmp_path, None, tmp_path / "log") == "key: is wrong"


def test_a_rank_that_was_killed_goes_before_what_the_others_lost(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(KILLED)
    (tmp_path / "error.json").write_text(json.dumps({"kind": "crash", "message": "Connection"}))
    first, second = cause(tmp_path, None, tmp_path / "log").splitlines()
    assert "task 1: Killed" in first
    assert second == "Connection"


def test_the_jobs_comment_where_there_was_no_room_for_a_file(tmp_path: Path) -> None:
    job = SlurmJob(number="5", name="seed@x", state="FAILED", comment="btx: no space left")
    assert cause(tmp_path, job, None) == "no space left"
    own = SlurmJob(number="5", name="seed@x", state="FAILED", comment="the user's")
    assert cause(tmp_path, own, None) == ""
