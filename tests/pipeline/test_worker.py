"""What a rank refuses of its environment."""

from __future__ import annotations

import dataclasses
import os
import socket
import tempfile
from pathlib import Path

import pytest

from megatron_btx.errors import UserError
from megatron_btx.pipeline import locks, worker
from megatron_btx.pipeline.graph import Stage

STAGE = Stage(name="seed", kind="seed", world_size=2)


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the first of two ranks that srun started."""
    for name in ("BTX_INIT_METHOD", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    known = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("port", ["http", "0", "70000", "-1"])
def test_a_port_that_is_none(two_ranks: pytest.MonkeyPatch, port: str) -> None:
    two_ranks.setenv("MASTER_PORT", port)
    with pytest.raises(UserError, match="MASTER_PORT"):
        worker._place(STAGE)


def test_a_port_in_use(two_ranks: pytest.MonkeyPatch) -> None:
    """Told by the first rank, before torch is imported; under torchrun its agent holds the port."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        two_ranks.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(UserError, match="in use"):
            worker._place(STAGE)
        two_ranks.setenv("RANK", "1")
        assert worker._place(STAGE) == 1
        two_ranks.setenv("RANK", "0")
        two_ranks.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        assert worker._place(STAGE) == 0
    two_ranks.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert worker._place(STAGE) == 0


def test_a_rank_has_the_threads_of_its_stage(two_ranks: pytest.MonkeyPatch) -> None:
    """Whatever its environment has said."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    for name in names:
        two_ranks.setenv(name, "1")
    two_ranks.setenv("BTX_INIT_METHOD", "env://")
    worker._place(dataclasses.replace(STAGE, num_threads=3))
    assert [os.environ[name] for name in names] == ["3", "3", "3"]


def test_a_rank_alone_has_nothing_that_would_stay_behind_it(
    two_ranks: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """However it is killed; that it meets itself, tests/cli/test_main.py shows."""
    two_ranks.setattr(tempfile, "tempdir", str(tmp_path))
    with worker._rendezvous():
        assert os.environ["BTX_INIT_METHOD"]
        assert os.listdir(tmp_path) == []


def test_a_stage_that_another_rank_is_at_work_in(
    two_ranks: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Started twice by hand: the second changes nothing, and is told how to find the first."""
    stage = Stage(name="prepare", kind="prepare", world_size=1)
    directory = tmp_path / stage.directory
    directory.mkdir()
    two_ranks.setattr(worker.graph, "of_run", lambda *_: (stage,))
    two_ranks.setattr(worker.locks.wait_until_idle, "__defaults__", (0.2,))
    with locks.stage_lock(directory), pytest.raises(locks.Busy, match="fuser"):
        worker._begin_unaided(None, stage, tmp_path, 0)  # type: ignore[arg-type]
    assert [path.name for path in directory.iterdir()] == ["lock"]
