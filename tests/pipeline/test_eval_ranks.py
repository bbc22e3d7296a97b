"""Ranks outside of any run."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_btx.cli.main import interruptible
from megatron_btx.errors import UserError
from megatron_btx.pipeline import eval_ranks
from megatron_btx.recipe.schema import Layout


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_number_of_ranks_that_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv({"WORLD_SIZE": "RANK"}.get(name, "SLURM_PROCID"), "0")
    monkeypatch.setenv(name, "four")
    with pytest.raises(UserError, match=f"{name}: is 'four'\n  fix: give a whole number"):
        eval_ranks.answer({"what": "data", "layout": dataclasses.asdict(Layout()), "subjects": []})


RANK = """#!/bin/sh
touch {out}/.rows.$$.tmp {out}/.another.$$.tmp
kill -TERM $BTX_PARENT
exec sleep 600
"""


def test_a_wish_to_stop_leaves_neither_scratch_nor_what_a_rank_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, scratch = tmp_path / "rank", tmp_path / "tmp"
    scratch.mkdir()
    rank.write_text(RANK.format(out=tmp_path))
    rank.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(rank))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    asked = eval_ranks.request_of("data", [], Layout(), writes=[str(tmp_path / "rows")])
    with pytest.raises(KeyboardInterrupt), interruptible(once=False):
        eval_ranks.answer(asked)
    left = [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    assert [name.split(".")[1] for name in left] == ["another"]
    assert os.listdir(scratch) == []


def test_scratch_goes_whole_whatever_comes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first wish to stop, while a command that has ended well clears up."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rmtree = eval_ranks.remove_tree

    def disturbed(directory: Path) -> None:
        monkeypatch.setattr(os, "scandir", signalling(os.scandir))
        rmtree(directory)

    def signalling(scandir):  # type: ignore[no-untyped-def]
        def scan(*arguments):  # type: ignore[no-untyped-def]
            monkeypatch.setattr(os, "scandir", scandir)
            os.kill(os.getpid(), signal.SIGTERM)
            return scandir(*arguments)

        return scan

    monkeypatch.setattr(eval_ranks, "remove_tree", disturbed)
    stopped, used = pytest.raises(KeyboardInterrupt), interruptible(once=False)
    with stopped, used, eval_ranks._scratch() as scratch:
        (scratch / "answer.json").touch()
    assert os.listdir(tmp_path) == []
