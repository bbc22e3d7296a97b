"""What a row says that Slurm's own word does not."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megatron_btx.files import ProgressFile, write_json
from megatron_btx.pipeline import locks, state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.slurm import commands, run_jobs, status, status_table
from megatron_btx.pipeline.slurm.cause import why_waiting
from megatron_btx.pipeline.slurm.commands import SlurmJob


@pytest.mark.parametrize(
    ("state", "ago", "forgotten"),
    [("RUNNING", 3600, True), ("RUNNING", 0, False), ("COMPLETED", 3600, False)],
)
def test_a_job_that_slurm_takes_for_running_though_it_has_ended(
    state: str, ago: float, forgotten: bool
) -> None:
    job = SlurmJob(number="5", name="seed@x", state=state)
    assert status._forgotten(job, {"finished": time.time() - ago}) is forgotten
    assert not status._forgotten(job, {"finished": "damaged"})


@pytest.mark.parametrize(
    ("state", "reason", "held"),
    [
        ("PENDING", "launch_failed_requeued_held", True),
        ("PENDING", "job_requeued_in_held_state", True),
        ("PENDING", "JobHeldUser", True),
        ("PENDING", "JobHeldAdmin", True),
        ("REQUEUE_HOLD", "", True),
        ("PENDING", "Dependency", False),
        ("RUNNING", "", False),
    ],
)
def test_what_waits_for_a_person(state: str, reason: str, held: bool) -> None:
    job = SlurmJob(number="5", name="seed@x", state=state, reason=reason)
    assert job.held is held
    assert ("scontrol release 5" in why_waiting(job, done=False)) is held


def test_a_local_preparation_on_its_way(tmp_path: Path) -> None:
    """MB/s and the time left, of the stage that the ``btx run`` at work has begun."""
    stage = Stage(name="prepare", kind="prepare", key="k")
    directory = tmp_path / "prepare"
    (directory / "log").mkdir(parents=True)
    state.begin(directory, 1, 1)

    def row() -> status_table.StageStatus:
        (found,) = status.rows(tmp_path, (stage,))
        return found

    assert row().state == "interrupted"
    with locks.run_lock(tmp_path):
        state.begin(directory, 2, 1)
        what = "tokens at 3.0 MB/s, 2 min left,"
        progress = ProgressFile(directory / "progress.json")
        progress(what, 0.4, bytes_per_second=3e6, seconds_left=125.0)
        assert (row().state, row().step, row().left) == ("running", f"{what} 40%", "2:05")
    assert (row().state, row().left) == ("interrupted", "")


def test_a_second_attempt_is_starting(tmp_path: Path) -> None:
    """Not at the first one's step, with its loss; of one that is not at work those are told."""
    stage = Stage(name="seed", kind="seed", key="k")
    directory = tmp_path / "seed"
    (directory / "log").mkdir(parents=True)
    state.begin(directory, 1, 1)
    records = [
        {"kind": "start", "step": 0, "total_steps": 100, "time": time.time()},
        {"kind": "train", "step": 40, "loss": 3.0, "tokens_per_second": 9.0, "time": time.time()},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    with locks.run_lock(tmp_path):
        state.begin(directory, 2, 1)
        (row,) = status.rows(tmp_path, (stage,))
        assert (row.state, row.step, row.loss, row.tokens_per_second, row.left) == (
            *("running", "starting", None, None, ""),
        )
    (row,) = status.rows(tmp_path, (stage,))
    assert (row.state, row.step, row.loss) == ("interrupted", "40/100", 3.0)


def test_an_array_in_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``scontrol -o show job`` says of an array: a line a job, those that wait together."""
    line = "JobId={} ArrayJobId=8 ArrayTaskId={} JobName=prepare:shards@x UserId=me(0) Restarts={}"
    line += " JobState={} Reason={} RunTime=00:00:05 TimeLimit=01:00:00 NodeList={} WorkDir=/r\n"
    text = line.format(9, 0, 0, "COMPLETED", "None", "n1")
    text += line.format(10, 1, 1, "RUNNING", "None", "n2")
    text += line.format(11, 2, 0, "RUNNING", "None", "n1")
    text += line.format(8, "3-4", 0, "PENDING", "Resources", "(null)")
    monkeypatch.setattr(commands, "call", lambda *command: text)
    stage = Stage(name="prepare:shards", kind="prepare", key="k")
    places = [tmp_path / "prepare" / "shards" / str(task) for task in range(5)]
    for place in places[:3]:
        place.mkdir(parents=True)
    write_json(places[0] / "done.json", {"key": "k"})
    for place, done, left in ((places[1], 0.5, 60.0), (places[2], 0.25, 90.0)):
        progress = ProgressFile(place / "progress.json")
        progress("tokens", done, bytes_per_second=2e6, seconds_left=left)
    row = status.array_row(tmp_path, stage, "8", 5)
    assert (row.state, row.nodes, row.restarts, row.active) == ("running", "n1,n2", 1, True)
    assert (row.step, row.left) == ("1 of 5 done, 4.0 MB/s, 35%", "1:30")
    assert row.note == ""
    text = text.replace("RUNNING", "FAILED", 1)
    write_json(places[1] / "error.json", {"kind": "user", "message": "/d/a.jsonl:7: is broken"})
    row = status.array_row(tmp_path, stage, "8", 5)
    assert row.note == "prepare:shards/1: /d/a.jsonl:7: is broken"
    text = line.format(10, 1, 0, "FAILED", "None", "n2") + line.format(8, 2, 0, "COMPLETED", "", "")
    assert status.array_row(tmp_path, stage, "8", 5).state == "failed"


def test_a_run_directory_behind_a_link_is_the_same_run(tmp_path: Path) -> None:
    """As of a home that is a link to a parallel file system."""
    (tmp_path / "gpfs" / "runs" / "x").mkdir(parents=True)
    (tmp_path / "home").symlink_to(tmp_path / "gpfs")
    real, link = tmp_path / "gpfs/runs/x", tmp_path / "home/runs/x"
    for submitted, asked in ((real, link), (link, real), (real, real)):
        job = SlurmJob(number="5", name="seed@x", state="PENDING", directory=str(submitted))
        seed = Stage(name="seed", kind="seed", key="k")
        assert run_jobs.is_of(job, asked, seed, {})
        assert not run_jobs.is_of(job, asked / "y", seed, {})
