"""The first step of a batch job, one task a node.

Each task sees whether its node shares the run's directory. The first one makes the stage's
directory ready and prints ``begun ATTEMPT KEY DIRECTORY`` for the batch script, attempt 0 where the
stage is done already; or ``busy``, where ranks of this very job live on, on a node that Slurm has
lost: it is to be requeued. With ``--probe FILE TOKEN`` it looks and does no more. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import time
import traceback
from pathlib import Path

from megatron_btx.errors import UserError
from megatron_btx.files import write_json
from megatron_btx.pipeline import failure, graph, locks, prepare_array, state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.slurm import run_jobs
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Recipe
from megatron_btx.train.goodput import read_attempts

TOKEN = "slurm/token"
"""File of the run's directory by which a node's view of it is known."""

WITHOUT_PROGRESS = 3
"""Restarts without progress after which a job gives up."""

_LINGERING = 60.0
"""Seconds that the processes of another job, which has ended, get to exit."""
_OWN_LINGERING = 10.0
"""The same of this job's: Slurm ends them all before it starts the job again."""
_OUTLIVED = 600.0
"""Seconds that ranks on a lost node get to notice that they should save and end (watchdog.py)."""


class Outlived(locks.Busy):
    """Ranks of this job have outlived their node's loss."""


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
            return _first(load_recipe(recipe_path), name)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _first(recipe: Recipe, name: str) -> int:
    try:
        attempt, key, directory = begin(recipe, name)
    except locks.Busy as error:  # the directory is the others': nothing is written there
        sys.stderr.write(f"error: {error}\n")
        if isinstance(error, Outlived) and _restarts() <= recipe.slurm.max_restarts:
            sys.stdout.write("busy\n")
        return 2
    except Exception as error:
        stage = Stage(name=name, kind=name.partition(":")[0])
        directory = Path(recipe.run_dir).absolute() / stage.directory
        seen = failure.leave(directory, 0, error) if directory.is_dir() else error
        if not isinstance(seen, UserError):
            traceback.print_exception(error)
            return 1
        sys.stderr.write(f"error: {seen}\n")
        return 2
    sys.stdout.write(f"begun {attempt} {key} {directory}\n")
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
        Outlived: ranks of an earlier start of this job live on.
        Busy: another job is at work in it.
        UserError: what it needs is not done, or it has been restarted too often.
    """
    run_dir = Path(recipe.run_dir).absolute()
    if "BTX_STAGE_KEY" in os.environ:  # as it was submitted, whatever has changed since then
        every = graph.outline(recipe)
        stage = dataclasses.replace(
            prepare_array.find(every, name), key=os.environ["BTX_STAGE_KEY"]
        )
        missing = [need for need in graph.read_by(stage, every) if not _ended(run_dir, need)]
    else:
        every = graph.of_run(recipe, run_dir)
        stage = prepare_array.find(every, name)
        missing = list(state.missing(run_dir, graph.read_by(stage, every)))
    directory, whole = run_dir / stage.directory, prepare_array.whole(stage)
    state.link_shared(run_dir, (whole,), recipe.share)
    if state.done(run_dir, whole) is not None:
        return 0, stage.key, directory
    if missing:
        names = ", ".join(need.name for need in missing)
        raise UserError(stage.name, f"needs {names} first", "submit those, too")
    directory.mkdir(parents=True, exist_ok=True)
    _wait_until_idle(directory)
    if stage.name == prepare_array.BEGIN:  # none of those that were begun for an earlier submission
        _wait_until_idle(run_dir / whole.directory)
    prepare_array.claim(run_dir, stage)
    if state.done(run_dir, whole) is not None:  # taken back from old/
        return 0, stage.key, directory
    made = progress(run_dir / whole.directory)
    _limit_restarts(recipe, directory, made)
    attempt = state.next_attempt(directory)
    state.log_file(directory, attempt).touch()
    noted = run_jobs.this_job() | {"progress": made}
    state.begin(directory, attempt, stage.world_size, **noted)
    return attempt, stage.key, directory


def _wait_until_idle(directory: Path) -> None:
    """Wait for the processes of an earlier attempt to be gone. Where it was this same job, Slurm
    has lost the node that they are on: they are asked to save and to end.

    Raises:
        Outlived: they are those of this job, and still there.
        Busy: they are another job's.
    """
    former, job = run_jobs.begun(directory), os.environ.get("SLURM_JOB_ID")
    own = job is not None and former.get("job") == job
    try:
        locks.wait_until_idle(directory, _OWN_LINGERING if own else _LINGERING)
        return
    except locks.Busy:
        if not own:
            who = f"job {former['job']} of {former.get('user')}" if former else "another run"
            what = f"processes of {who} are at work in it (nodes: {former.get('nodes', '?')})"
            fix = "wait for them or end them (`btx cancel`), and submit again"
            raise locks.Busy(str(directory), what, fix) from None
    nodes = former.get("nodes")
    sys.stderr.write(f"{directory}: ranks of this job live on ({nodes}): they are asked to end\n")
    write_json(directory / state.LEAVE, {"job": former["job"], "time": time.time()})
    try:
        locks.wait_until_idle(directory, _OUTLIVED)
    except locks.Busy:
        what = f"ranks of this job live on, on a node that Slurm has lost ({nodes})"
        raise Outlived(str(directory), what, "have that node rebooted") from None


def progress(directory: Path) -> str:
    """A stage's progress on the disk; a restart that leaves it unchanged has made none."""
    steps = sorted(path.name for path in directory.glob("checkpoints/step_????????"))
    pairs, shards = (  # of prepare
        sum(1 for _ in directory.glob(f"data/*/{made}")) for made in ("*.json", ".shards*/*.json")
    )
    return steps[-1] if steps else f"{pairs}.{shards}"


def _ended(run_dir: Path, stage: Stage) -> bool:
    return (run_dir / stage.directory / "done.json").exists()


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _limit_restarts(recipe: Recipe, directory: Path, now: str) -> None:
    """Stop a job that restarts without getting on (it stands at ``now``), or without end."""
    job, restarts = os.environ.get("SLURM_JOB_ID"), _restarts()
    attempts = read_attempts(directory)
    starts = [line.get("progress") for line in attempts if line.get("job") == job]
    same = 0
    while same < len(starts) and starts[-1 - same] == now:
        same += 1
    if restarts and same > WITHOUT_PROGRESS:
        what = f"has been restarted {WITHOUT_PROGRESS} times without progress"
        fix = "give it more time (`slurm.time`, `signal_seconds`) or save more often"
    elif restarts > recipe.slurm.max_restarts:
        what, fix = f"has been restarted {restarts - 1} times", "raise `slurm.max_restarts`"
    else:
        return
    raise UserError(directory.name, what, f"{fix}, and submit again")


if __name__ == "__main__":
    sys.exit(main())
