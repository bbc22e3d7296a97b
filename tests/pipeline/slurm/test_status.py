"""What a row says that Slurm's own word does not."""

from __future__ import annotations

import time

import pytest

from megatron_btx.pipeline.slurm import status
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
    assert ("scontrol release 5" in status._waits(job, done=False)) is held
