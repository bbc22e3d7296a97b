"""The first step of a batch job, one task a node.

Each task sees whether its node shares the run's directory. The first one makes the stage's
directory ready and prints ``begun ATTEMPT KEY DIRECTORY`` for the batch script, attempt 0 where the
stage is done already. With ``--probe FILE TOKEN`` it looks and does no more. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.pipeline import graph, state
from megatron_btx.pipeline.fingerprint import Memo
from megatron_btx.pipeline.graph import Stage
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Recipe

TOKEN = "slurm/token"
"""File of the run's directory by which a node's view of it is known."""

WITHOUT_PROGRESS = 3
"""Restarts without progress after which a job gives up."""


def main(arguments: list[str] | None = None) -> int:
    """One task; the exit code is 0, or 2 for what the user can put right."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if words[0] == "--probe":
            see(Path(words[1]), words[2])
            sys.stdout.write("begun probe\n")
            return 0
        recipe_path, name = words
        if "BTX_SUBMISSION" in os.environ:
            see(Path(recipe_path).parent / TOKEN, os.environ["BTX_SUBMISSION"])
        if int(os.environ.get("SLURM_PROCID", "0")) == 0:
            attempt, key, directory = begin(load_recipe(recipe_path), name)
            sys.stdout.write(f"begun {attempt} {key} {directory}\n")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def see(path: Path, token: str) -> None:
    """That this machine sees the file that the submitting one wrote.

    Raises:
        UserError: it does not.
    """
    try:
        seen = path.read_text(encoding="utf-8").strip()
    except OSError:
        seen = None
    if seen != token:
        raise UserError(
            str(path.parent.parent),
            f"the node {socket.gethostname()} does not share this directory",
            "give a `run_dir:` on a file system that all nodes mount (in a container: at the same "
            "place)",
        )


def begin(recipe: Recipe, name: str) -> tuple[int, str, Path]:
    """Make stage ``name`` ready for an attempt.

    Returns:
        The attempt's number (0: the stage is done), the stage's key and its directory.

    Raises:
        UserError: what it needs is not done, or it has been restarted too often.
    """
    run_dir = Path(recipe.run_dir).absolute()
    stages = graph.with_mix(graph.build(recipe, Memo(run_dir / "fingerprints.json")))
    stage = graph.find(stages, name)
    by_name = {other.name: other for other in stages}
    needs = tuple(by_name[need] for need in stage.needs if need != "mix")
    if "BTX_STAGE_KEY" in os.environ:  # as it was submitted, whatever has changed since then
        stage = dataclasses.replace(stage, key=os.environ["BTX_STAGE_KEY"])
        missing = [need for need in needs if not _ended(run_dir, need)]
    else:
        missing = list(state.left(run_dir, needs))
    directory = run_dir / stage.directory
    state.link_shared(run_dir, (stage,), recipe.share)
    if state.done(run_dir, stage) is not None:
        return 0, stage.key, directory
    if missing:
        names = ", ".join(need.name for need in missing)
        raise UserError(stage.name, f"needs {names} first", "submit those, too")
    directory.mkdir(parents=True, exist_ok=True)
    state.wait_until_idle(directory, timeout=60)
    state.claim(run_dir, stage)
    if state.done(run_dir, stage) is not None:  # taken back from old/
        return 0, stage.key, directory
    _limit_restarts(recipe, directory)
    attempt = state.next_attempt(directory)
    state.log_file(directory, attempt).touch()
    slurm = {"job": os.environ.get("SLURM_JOB_ID"), "progress": progress(directory)}
    state.begin(directory, attempt, stage.world_size, **slurm)
    return attempt, stage.key, directory


def progress(directory: Path) -> str:
    """How far a stage has come on the disk: what a restart without it has not changed."""
    steps = sorted(path.name for path in directory.glob("checkpoints/step_????????"))
    made = sum(1 for _ in directory.glob("data/*/*.json"))  # of prepare
    return steps[-1] if steps else str(made)


def _ended(run_dir: Path, stage: Stage) -> bool:
    return (run_dir / stage.directory / "done.json").exists()


def _limit_restarts(recipe: Recipe, directory: Path) -> None:
    """Stop a job that restarts without getting on, or without end."""
    job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    starts = [line.get("progress") for line in _attempts(directory) if line.get("job") == job]
    now, same = progress(directory), 0
    while same < len(starts) and starts[-1 - same] == now:
        same += 1
    if restarts and same > WITHOUT_PROGRESS:
        what = f"has been restarted {WITHOUT_PROGRESS} times without progress"
        fix = "give it more time (`slurm.time`, `signal_seconds`) or save more often"
    elif restarts > recipe.slurm.max_restarts:
        what, fix = f"has been restarted {restarts - 1} times", "raise `slurm.max_restarts`"
    else:
        return
    error = UserError(directory.name, what, f"{fix}, and submit again")
    record = {"kind": "user", "rank": 0, "message": str(error)}
    state.write_json(directory / "error.json", record)
    raise error


def _attempts(directory: Path) -> list[dict[str, Any]]:
    path = directory / "attempts.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


if __name__ == "__main__":
    sys.exit(main())
