"""One rank of one stage: ``python -m megatron_btx.pipeline.worker RECIPE STAGE``.

The same under the local runner, which forks it on CPUs (local/fork_server.py), and under ``srun``:
what a rank needs to know is in its environment
(``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, or Slurm's names for them). How a stage ended is decided
by the file it leaves (``done.json``, ``stopped.json``, ``error.json``), never by an exit code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_btx import engine
from megatron_btx.errors import UserError
from megatron_btx.files import ProgressFile, write_json
from megatron_btx.pipeline import (
    failure,
    graph,
    import_checkpoint,
    locks,
    prepare_array,
    state,
    watchdog,
)
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.local import reaper
from megatron_btx.pipeline.slurm import run_jobs
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Recipe
from megatron_btx.train import tracking

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def _prepare(recipe: Recipe, stage: Stage, run_dir: Path) -> Any:
    out = run_dir / prepare_array.whole(stage).directory
    progress = ProgressFile(run_dir / stage.directory / "progress.json")
    share = prepare_array.share(recipe, stage, run_dir)
    if share is not None:
        from megatron_btx.data.prepare import make_share

        return make_share(recipe, out, *share, progress)
    with engine.importing():
        from megatron_btx.data import prepare
        from megatron_btx.train.train_stage import check_options

    check_options(recipe)
    import_checkpoint.check_export(recipe)
    if stage.name == prepare_array.BEGIN:
        return prepare.begin(recipe, out, progress)
    return prepare.prepare(recipe, out, progress)


def _train(recipe: Recipe, stage: Stage, run_dir: Path) -> Any:
    with engine.importing():
        from megatron_btx.train.train_stage import run

    return run(recipe, stage.name, run_dir, stage.needs)


def _mix(recipe: Recipe, stage: Stage, run_dir: Path) -> Any:
    with engine.importing():
        from megatron_btx.train.train_stage import check_mix

    plan = check_mix(recipe, run_dir)
    write_json(run_dir / stage.directory / "plan.json", plan)
    return plan


def _evaluate(recipe: Recipe, stage: Stage, run_dir: Path) -> Any:
    with engine.importing():
        from megatron_btx.evaluate.evaluate_stage import run

    return run(recipe, run_dir)


def _export(recipe: Recipe, stage: Stage, run_dir: Path) -> Any:
    with engine.importing():
        from megatron_btx.evaluate.export import run

    return run(recipe, run_dir)


def _import(recipe: Recipe, stage: Stage, run_dir: Path) -> Any:
    return import_checkpoint.link(recipe, stage.name, run_dir)


KINDS: dict[str, Callable[[Recipe, Stage, Path], Any]] = {
    "prepare": _prepare,
    "import": _import,
    "seed": _train,
    "expert": _train,
    "mix": _mix,
    "finetune": _train,
    "dense": _train,
    "evaluate": _evaluate,
    "export": _export,
}
"""What a rank runs for each kind of stage. It returns what goes into ``done.json`` as ``outputs``
(a mapping, or nothing). ``report`` is the command line's: it needs no ranks."""

_TOLD = ("prepare", "mix", "evaluate", "export")
"""Kinds that log no metrics, and tell W&B when they are done what they have used and made."""

_WATCHED = (_train, _evaluate)
"""Whose ranks wait for each other, so that one that hangs holds all."""


def main(arguments: list[str] | None = None) -> int:
    """Run one rank; the exit code is 0 (done), 75 (stopped and saved), 2 (the user's mistake) or
    1 (a crash)."""
    reaper.die_with_parent()
    recipe_path, stage_name = sys.argv[1:] if arguments is None else arguments
    try:
        recipe = load_recipe(recipe_path)
        run_dir = Path(recipe.run_dir)
        return run_rank(recipe, stage_of(recipe, stage_name, run_dir), run_dir)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def stage_of(recipe: Recipe, name: str, run_dir: Path) -> Stage:
    """The stage that a rank is to be of. Who started it may have told the key
    (``BTX_STAGE_KEY``): files may have changed since the run began, and no rank hashes a corpus.

    Raises:
        UserError: the recipe has no such stage.
    """
    if "BTX_STAGE_KEY" in os.environ:
        stage = prepare_array.find(graph.outline(recipe), name)
        return dataclasses.replace(stage, key=os.environ["BTX_STAGE_KEY"])
    return prepare_array.find(graph.of_run(recipe, run_dir), name)


def run_rank(recipe: Recipe, stage: Stage, run_dir: Path) -> int:
    """One rank of ``stage``, its place read from the environment."""
    rank = _place(stage)
    directory = run_dir / stage.directory
    # Started by srun or by hand. Else a runner or a batch script has looked, for all ranks alike:
    # on another machine a rank's view of a network file system may be older.
    if "BTX_ATTEMPT" not in os.environ:
        if state.done(run_dir, prepare_array.whole(stage)) is not None:
            return 0
        _begin_unaided(recipe, stage, run_dir, rank)
    dog = watchdog.Watchdog(
        directory=directory,
        rank=rank,
        world_size=stage.world_size,
        grace=recipe.slurm.signal_seconds,
        hang=60 * recipe.hang_minutes if KINDS[stage.kind] in _WATCHED else 0,
    )
    whole = run_dir / prepare_array.whole(stage).directory
    with locks.stage_lock(whole), locks.stage_lock(directory), dog.watching(), _rendezvous():
        try:
            outputs = KINDS[stage.kind](recipe, stage, run_dir)
        except Exception as error:
            return _failed(directory, rank, error)
        if (directory / "stopped.json").exists():
            return state.EXIT_STOPPED
        if rank == 0:
            if stage.kind in _TOLD and not prepare_array.is_part(stage):
                tracking.track(recipe, stage.name, stage.needs, run_dir)
            state.finish(directory, stage, dict(outputs or {}))
    return 0


def _place(stage: Stage) -> int:
    """Complete the environment of a rank; its number."""
    in_slurm = "RANK" not in os.environ and "SLURM_PROCID" in os.environ
    for name, slurm in _SLURM.items():
        if name not in os.environ:
            os.environ[name] = os.environ.get(slurm, _ALONE[name]) if in_slurm else _ALONE[name]
    world_size, rank = _number("WORLD_SIZE"), _number("RANK")
    if world_size != stage.world_size:
        raise UserError(
            stage.name,
            f"its layout has {stage.world_size} rank(s), {world_size} were started",
            "start as many tasks as `btx plan` says, or use `btx run`",
        )
    if not 0 <= rank < world_size:
        raise UserError("RANK", f"is {rank}", f"give a number from 0 to {world_size - 1}")
    _number("LOCAL_RANK")
    if world_size > 1 and not _can_meet():
        raise UserError(
            "MASTER_ADDR",
            f"is not set, or MASTER_PORT is not: the {world_size} ranks would not find each other",
            "export MASTER_ADDR (the host of rank 0) and MASTER_PORT (a free port there, the same "
            "for all ranks), or use `btx run` or `btx submit`",
        )
    if world_size > 1 and "BTX_INIT_METHOD" not in os.environ:
        _check_port(rank)
    for name in THREADS:
        os.environ[name] = str(stage.num_threads)
    limit_caches()
    return rank


def limit_caches() -> None:
    """Before torch computes anything: oneDNN keeps a compiled primitive for every new shape, 1024
    of them by default. The number of tokens that an expert gets is a new shape in every layer of
    every step (bf16, hidden 256: from step 90 to 120 a rank grew by 125 MB with the default, by
    17 MB with this)."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def _can_meet() -> bool:
    """Whether the environment says where the ranks of a job find each other."""
    return "BTX_INIT_METHOD" in os.environ or {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def _check_port(rank: int) -> None:
    """That ``MASTER_PORT`` is a port, and on the first rank that nothing else listens there. Under
    torchrun its agent does, for the ranks.

    Raises:
        UserError: it is not.
    """
    port = _number("MASTER_PORT")
    if not 1 <= port <= 65535:
        raise UserError("MASTER_PORT", f"is {port}", "give a free port, 1024 to 65535")
    if rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                return
            what = f"is {port}, which is in use on {socket.gethostname()} or not yours to use"
            fix = "give a free one, the same for all ranks"
            raise UserError("MASTER_PORT", what, fix) from None


@contextlib.contextmanager
def _rendezvous() -> Iterator[None]:
    """Rendezvous of a single rank that was started by hand: at a port that the system
    chooses. A file would stay behind a rank that is killed."""
    if _can_meet():
        yield
        return
    os.environ["BTX_INIT_METHOD"] = "tcp://127.0.0.1:0"
    yield
    del os.environ["BTX_INIT_METHOD"]


def _number(name: str) -> int:
    """An environment variable that is a whole number."""
    text = os.environ[name]
    if not text.strip().isdecimal():
        raise UserError(name, f"is {text!r}", "give a whole number, or use `btx run`")
    return int(text)


def _begin_unaided(recipe: Recipe, stage: Stage, run_dir: Path, rank: int) -> None:
    """What the local runner does before it starts the ranks, done by the first of them."""
    directory = run_dir / stage.directory
    if rank != 0:
        deadline = time.monotonic() + 120
        while (state.find_json(directory / "stage.json") or {}).get("key") != stage.key:
            if time.monotonic() > deadline:
                raise UserError(
                    str(directory),
                    "rank 0 did not prepare this stage within 120 s",
                    "see rank 0's log",
                )
            time.sleep(0.2)
        return
    needs = graph.read_by(stage, graph.of_run(recipe, run_dir))
    missing = [need.name for need in state.missing(run_dir, needs)]
    if missing:
        raise UserError(stage.name, f"needs {', '.join(missing)} first", "run those, or `btx run`")
    # Of several ranks the others may hold the lock already; there the port tells (_check_port).
    if stage.world_size == 1 and directory.is_dir():
        locks.wait_until_idle(directory)
    run_dir.mkdir(parents=True, exist_ok=True)
    prepare_array.claim(run_dir, stage)
    attempt = state.next_attempt(directory)
    os.environ["BTX_ATTEMPT"] = str(attempt)
    state.log_file(directory, attempt).touch()
    state.begin(directory, attempt, stage.world_size, **run_jobs.this_job())


def _failed(directory: Path, rank: int, error: Exception) -> int:
    """Leave ``error.json`` unless another rank was first, and the traceback in the log."""
    seen = failure.leave(directory, rank, error)
    if isinstance(seen, UserError):
        sys.stderr.write(f"{seen}\n")
        return 2
    traceback.print_exception(error)
    return 1


def leave(code: int) -> None:
    """End the process at once after a failure: other ranks may be waiting in a collective, and the
    usual clean-up would wait for them."""
    if code not in (0, state.EXIT_STOPPED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    exit_code = main()
    leave(exit_code)
    sys.exit(exit_code)
