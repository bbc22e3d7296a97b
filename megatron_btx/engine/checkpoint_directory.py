"""The directories of a stage's checkpoints: their names, which are deleted, and disk errors.

A checkpoint is written under another name and renamed when it is complete: a directory
``step_00000123`` can be loaded, however the writer ended.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_btx.engine.distributed import is_first_rank
from megatron_btx.errors import UserError
from megatron_btx.files import not_written

_PARTIAL, _OLD, _LAST = ".partial", ".old", ".last"
_SAVED = re.compile(
    r".*\.distcp|\.metadata|common\.pt|(metadata|manifest|hashes)\.json|tokenizer|\..*\.tmp"
)
"""Names of what lies in a checkpoint."""


def step_directory(checkpoints: Path, step: int) -> Path:
    """Where a step's checkpoint lies."""
    return checkpoints / f"step_{step:08d}"


def last_step_directory(checkpoints: Path, step: int) -> Path:
    """Where the last step's own weights lie while a stage's model, their mean with others, has not
    been saved under the step's name; who goes on does not find them."""
    return checkpoints / f"step_{step:08d}{_LAST}"


def partial_of(directory: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return directory.with_name(directory.name + _PARTIAL)


def wait_until_seen(directory: Path, seconds: float = 60.0) -> None:
    """Wait for a directory that another rank has named: NFS lets a machine's view of its parent be
    as old as ``acdirmax`` (60 s by default, nfs(5))."""
    deadline = time.monotonic() + seconds
    while dist.get_rank() and not directory.exists() and time.monotonic() < deadline:
        time.sleep(1.0)


def prune(checkpoints: Path, keep: int, spared: Collection[int] = ()) -> None:
    """Delete all but the last ``keep`` checkpoints of a stage, and those of the steps ``spared``.
    The first rank calls it."""
    kept = {step_directory(checkpoints, step) for step in spared}
    old_ones = sorted(checkpoints.glob("step_????????"))[:-keep]
    for old in filter(_is_ours, (one for one in old_ones if one not in kept)):
        # Renamed first: a half-deleted checkpoint must not keep its name.
        doomed = old.with_name(old.name + _OLD)
        old.rename(doomed)
        shutil.rmtree(doomed)


def sweep(checkpoints: Path) -> None:
    """Delete what a killed run had half written, half deleted or not averaged yet. The first rank
    calls it."""
    for suffix in (_PARTIAL, _OLD, _LAST, _LAST + _PARTIAL):
        for left in filter(_is_ours, checkpoints.glob("step_????????" + suffix)):
            shutil.rmtree(left)


def _is_ours(directory: Path) -> bool:
    """Whether there is nothing in it but what a save puts there."""
    there = directory.is_dir() and not directory.is_symlink()
    return there and all(_SAVED.fullmatch(path.name) for path in directory.iterdir())


def make_room(directory: Path) -> None:
    """Make room for a checkpoint.

    Raises:
        UserError: what is there is not all ours.
    """
    if _is_ours(directory):
        shutil.rmtree(directory)
    elif os.path.lexists(directory):
        what = "exists and contains files that no checkpoint has; it was not overwritten"
        raise UserError(str(directory), what, "move it away")


@contextlib.contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Within the block, disk errors of the writers of a checkpoint become a :class:`UserError`, and
    the partial checkpoint, which may be what fills the disk, is removed."""
    try:
        yield
    except OSError as error:
        if is_first_rank():
            shutil.rmtree(partial_of(directory), ignore_errors=True)
        raise not_written(directory, error) from error
