"""A checkpoint that is written while training goes on: what it holds is what was there when it was
begun, and what a rank that is killed meanwhile leaves is the one before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_btx.weights.file_hashes import files_of, hash_file, hashes_of
from tests.engine.harness import DENSE, MOE, Case, Pieces, Session, assemble
from tests.engine.test_checkpoint import DP2, EP2, session
from tests.ranks import Ranks
from tests.small import ROOT
from tests.train.stages import run


def write_beside(case: Case, folder: Path) -> tuple[Pieces, list[float], list[bool]]:
    """Train two steps, begin a save that may write nothing yet, train two more, let it write.

    Returns:
        The weights as the save was begun, the losses that followed, and what ``finished`` said:
        before it could write anything, and with ``wait``.
    """
    import torch.distributed as dist

    from megatron_btx.engine import async_save, checkpoint_directory

    one = Session(case)
    for number in (0, 1):
        one.step(number)
    weights = one.weights()
    readable, writable = os.pipe()
    plain = async_save._write

    def held(*arguments: Any) -> None:
        os.close(writable)
        os.read(readable, 1)
        plain(*arguments)

    async_save._write = held
    try:
        target = checkpoint_directory.step_directory(folder, 2)
        writing = async_save.AsyncSave(target, one.state, one.manifest(2))
    finally:
        async_save._write = plain
    losses = [one.step(number).loss for number in (2, 3)]
    said = [writing.finished()]
    dist.barrier()
    os.close(writable)
    os.close(readable)
    said.append(writing.finished(wait=True))
    return weights, losses, said


CASES = {
    "dense dp2": Case(DENSE, DP2),
    "bf16 dense dp2 distributed": Case(DENSE, DP2, "bf16", use_distributed_optimizer=True),
    "moe ep2": Case(MOE, EP2),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_what_was_there_at_its_beginning(
    name: str, ranks: Ranks, tmp_path: Path
) -> None:
    case = CASES[name]
    begun = ranks.run(write_beside, 2, case, tmp_path)
    assert [said for _, _, said in begun] == [[False, True]] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
    step = tmp_path / "step_00000002"
    sizes = [path.stat().st_size for path in step.glob("*.distcp")]
    assert len(sizes) == 2, "every rank's, as btx plan --ranks has it"
    if case.use_distributed_optimizer:
        assert min(sizes) > 0.5 * max(sizes), "each writes what it holds of the optimizer's state"
    hashes = hashes_of(step)
    assert list(hashes) == files_of(step)
    assert hashes == {name: hash_file(step / name) for name in hashes}
    resumed = ranks.run(session, 2, case, tmp_path, 2, 2, False)
    there, read = (assemble([rank[0] for rank in side]) for side in (begun, resumed))
    for key, value in there.items():
        assert np.array_equal(value, read[key]), key
    assert resumed[0][1] == begun[0][1], "the losses that followed, bit for bit"


def test_a_stage_that_saves_beside_training(ranks: Ranks, tmp_path: Path) -> None:
    """Its losses and checkpoints are those of one that waits. Each of its saves is logged whole:
    what training waited for it, and how long it took."""
    case = Case(DENSE, DP2)
    for name in ("waited", "beside"):
        (tmp_path / name).mkdir()
    waited = ranks.run(run, 2, case, str(tmp_path / "waited"), 6)
    beside = ranks.run(partial(run, async_save=True), 2, case, str(tmp_path / "beside"), 6)
    for (_, one), (_, other) in zip(waited, beside, strict=True):
        assert all(np.array_equal(a[-1], b[-1]) for a, b in zip(one, other, strict=True))
    records = beside[0][0]
    losses = [
        [r["loss"] for r in found if r["kind"] == "train"] for found in (waited[0][0], records)
    ]
    assert losses[0] == losses[1]
    saves = {r["step"]: r for r in records if r["kind"] == "save"}
    assert [r["step"] for r in records if r["kind"] == "saving"] == [2, 4]
    assert list(saves) == [2, 4, 6]
    for step in (2, 4):
        stall = saves[step]["train/checkpoint_save_stall_s"]
        assert 0 < stall <= saves[step]["train/checkpoint_save_duration_s"]
    assert "train/checkpoint_save_stall_s" not in saves[6]
    assert [path.name for path in (tmp_path / "beside" / "checkpoints").iterdir()] == [
        "step_00000006"
    ]
    last = tmp_path / "beside" / "checkpoints" / "step_00000006"
    assert len(list(last.glob("*.distcp"))) == 1, "weights only: one of the two replicas'"


def failed(folder: Path, how: str) -> tuple[list[str], list[str]]:
    """What a save says whose ``files`` may not grow beyond 20 kB, or where the first rank finds no
    room for what it adds at the ``end``, or a process that writes is ``killed``; and what it leaves
    in the folder."""
    import errno
    import resource

    import torch

    from megatron_btx.engine import async_save, checkpoint, checkpoint_directory, distributed
    from megatron_btx.engine.model import build_model
    from megatron_btx.errors import UserError
    from tests.engine.harness import set_weights

    def add(_directory: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    distributed.initialize(DP2, 1)
    model = build_model(DENSE, DP2, "fp32")
    set_weights(model)
    state, said = checkpoint.TrainingState(model=model), []
    before, plain = resource.getrlimit(resource.RLIMIT_FSIZE), async_save._write
    if how == "files":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    elif how == "killed":
        async_save._write = die
    try:
        manifest = checkpoint.manifest_of(DENSE, layout={"world_size": 2})
        target = checkpoint_directory.step_directory(folder, 1)
        saving = async_save.AsyncSave(target, state, manifest, add if how == "end" else None)
        saving.finished(wait=True)
    except (UserError, RuntimeError) as error:
        said.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        async_save._write = plain
    torch.distributed.barrier()  # the first rank removes what is left
    return said, [path.name for path in folder.iterdir()]


@pytest.mark.parametrize(
    ("how", "why"), [("files", "File too large"), ("end", "No space left on device")]
)
def test_a_full_disk_is_one_error_on_every_rank(
    how: str, why: str, ranks: Ranks, tmp_path: Path
) -> None:
    for said, left in ranks.run(failed, 2, tmp_path, how):
        (line,) = said
        assert f"step_00000001: cannot be written: {why}" in line
        assert "fix: free some space" in line
        assert left == []


def test_a_process_that_is_killed_as_it_writes_is_told(ranks: Ranks, tmp_path: Path) -> None:
    for said, left in ranks.run(failed, 2, tmp_path, "killed"):
        assert "was not written: " in said[0]
        assert "the process that writes it was killed" in said[0]
        assert left == ["step_00000001.partial"]


KILLED = """
import os, sys, time
from pathlib import Path
from megatron_btx.engine import cpu
cpu.install()
from megatron_btx.engine import (
    async_save, checkpoint, checkpoint_directory, checkpoint_plan, distributed
)
from megatron_btx.engine.model import build_model
from megatron_btx.recipe.schema import Layout
from tests.engine.harness import DENSE, set_weights

distributed.initialize(Layout(), 1)
model = build_model(DENSE, Layout(), "fp32")
set_weights(model)
state, folder = checkpoint.TrainingState(model=model), Path(sys.argv[1])
manifest = checkpoint.manifest_of(DENSE, layout={"world_size": 1})
checkpoint.save(checkpoint_directory.step_directory(folder, 2), state, manifest)

def half(transforms, place, bucket, **how):
    Path(bucket[0]).write_bytes(b"half of it")
    print(os.getpid(), flush=True)
    time.sleep(600)

checkpoint_plan.FileSystemWriterAsync.write_preloaded_data = staticmethod(half)
async_save.AsyncSave(checkpoint_directory.step_directory(folder, 4), state, manifest)
time.sleep(600)
"""


def test_killed_in_the_middle_the_last_whole_one_is_left(tmp_path: Path) -> None:
    from megatron_btx.engine import checkpoint_directory
    from megatron_btx.files import newest_step

    rank = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env={
            **os.environ,
            **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "PYTHONPATH": str(ROOT)},
            "BTX_INIT_METHOD": f"file://{tmp_path}/rendezvous",
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    assert rank.stdout is not None
    try:
        writer = psutil.Process(int(rank.stdout.readline()))
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            writer.send_signal(number)  # as a launcher does, to every process of a task
        assert writer.status() != psutil.STATUS_ZOMBIE
    finally:
        rank.kill()
        rank.wait()
    _, alive = psutil.wait_procs([writer], timeout=600)
    assert not alive, "the process that writes ends with its rank"
    found = newest_step(tmp_path)
    assert found is not None
    assert found.name == "step_00000002"
    assert (tmp_path / "step_00000004.partial").exists()
    checkpoint_directory.sweep(tmp_path)
    assert not (tmp_path / "step_00000004.partial").exists()
    assert hashes_of(found) == {name: hash_file(found / name) for name in files_of(found)}
