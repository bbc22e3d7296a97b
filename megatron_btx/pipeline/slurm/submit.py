"""Stages as Slurm jobs: submitted all or none, written down, found again. Imports no torch.

Which stages is for selection.py to say, whether the cluster would run them for preflight.py, and
what a script says is sbatch.py's.

<run_dir>/slurm/token           by which every job knows the directory it was submitted from
<run_dir>/slurm/jobs.json       stage -> its latest job
<run_dir>/slurm/submit-<n>/     what a submission was: scripts, recipe, code, environment, jobs
<run_dir>/slurm/submit-<n>/<stage>.out      what the batch script says, over all requeues

A run directory belongs to one submission at a time. While it submits, it holds the lock that
``btx run`` takes as well (state.py); afterwards its jobs are the lock: they work in the directory,
and ``squeue`` tells. Neither outlives a crash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.files import written
from megatron_btx.pipeline import state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.slurm import attempt, commands, preflight, script
from megatron_btx.provenance import code_revision, versions
from megatron_btx.recipe import slurm
from megatron_btx.recipe.load import dump
from megatron_btx.recipe.schema import Recipe

_KEPT = re.compile(
    r"(CUDA|NCCL|GLOO|OMP|MKL|UCX|FI|TORCH|PYTORCH|CONDA|LMOD|NVTE|HF|WANDB|TRITON)_.*|CUDA\w*"
    r"|PATH|PYTHONPATH|LD_LIBRARY_PATH|LOADEDMODULES|VIRTUAL_ENV|HOSTNAME|LANG|TZ"
)
"""Environment variables that are written down, unless they look like a key."""


_WRITTEN = (attempt.TOKEN, "recipe.yaml", "slurm/jobs.json")
"""What a submission writes anew in the run's directory."""


def prepared(
    recipe: Recipe, run_dir: Path, chosen: tuple[Stage, ...], directory: Path, token: str
) -> dict[str, str]:
    """The script of every stage, in their order. ``run_dir`` and ``directory`` are absolute."""
    python = recipe.slurm.python or sys.executable
    if not slurm.printable(str(run_dir)):
        raise UserError(
            "run_dir", f"{str(run_dir)!r} has a line break or a control character", "rename it"
        )
    return {
        stage.name: script.script(
            recipe,
            stage,
            run_dir=run_dir,
            output=directory / f"{stage.directory}.out",
            python=python,
            token=token,
        )
        for stage in chosen
    }


def dry_run(recipe: Recipe, run_dir: Path, chosen: tuple[Stage, ...]) -> str:
    """Every script and the graph, as ``submit`` would send them."""
    run_dir = run_dir.absolute()
    scripts = prepared(recipe, run_dir, chosen, _next(run_dir), "0" * 32)
    lines = []
    for name, text in scripts.items():
        lines += [f"##### {name}", text]
    lines.append("##### the graph")
    lines += graph_lines(recipe, chosen)
    return "\n".join(lines) + "\n"


def graph_lines(recipe: Recipe, chosen: tuple[Stage, ...]) -> list[str]:
    """A line a job: its size and what it waits for."""
    names = {stage.name for stage in chosen}
    width = max((len(stage.name) for stage in chosen), default=0)
    lines = []
    for stage in chosen:
        job = slurm.resolve(recipe, stage.name)
        shape = slurm.shape(job, stage.world_size, stage.num_threads)
        gpus = f", {shape.gpus_per_node} GPUs each" if shape.gpus_per_node else ""
        size = f"{shape.nodes} node{'s' * (shape.nodes > 1)} x {shape.ranks_per_node}{gpus}"
        after = ", ".join(need for need in stage.needs if need in names)
        lines.append(f"{stage.name:<{width}}  {size:<12}  {after and 'after ' + after}".rstrip())
    return lines


def submit(
    recipe: Recipe, run_dir: Path, chosen: tuple[Stage, ...], *, probe: bool = True
) -> tuple[dict[str, str], list[str]]:
    """Submit the chosen stages, all or none.

    Returns:
        Job numbers by stage, and what a person should know.

    Raises:
        UserError: another submission or run has the directory, the cluster cannot run a stage, or
            Slurm refuses one. Nothing is left in the queue or on the disk.
    """
    run_dir = run_dir.absolute()
    with contextlib.ExitStack() as stack:
        undo = stack.enter_context(_removed_unless_kept(run_dir))
        stack.enter_context(state.run_lock(run_dir))
        refuse_active(run_dir)
        preflight.fits(recipe, chosen, commands.nodes())
        token, directory = uuid.uuid4().hex, _next(run_dir)
        scripts = prepared(recipe, run_dir, chosen, directory, token)
        preflight.accepted(scripts)
        directory.mkdir(parents=True)
        undo.append(directory)
        with _restored(*(run_dir / name for name in _WRITTEN)):
            (run_dir / attempt.TOKEN).write_text(token, encoding="utf-8")
            notes = preflight.probe(recipe, run_dir, chosen, token) if probe else []
            _keep(recipe, run_dir, directory, scripts)
            jobs = _send(run_dir, directory, chosen)
        undo.clear()
    return jobs, notes


def refuse_active(run_dir: Path) -> None:
    """That no job of this run is in the queue.

    Raises:
        UserError: some are.
    """
    active = commands.queued(str(run_dir))
    if active:
        names = ", ".join(f"{job.number} ({job.name.partition('@')[0]})" for job in active)
        raise UserError(
            str(run_dir),
            f"jobs of this run are in the queue: {names}",
            "wait for them (`btx status`), or end them first (`btx cancel`)",
        )


def refuse_beside_jobs(run_dir: Path) -> None:
    """For a run on this machine: ``refuse_active``, where Slurm is there to be asked.

    Raises:
        UserError: jobs of this run are in the queue.
    """
    if not (run_dir / "slurm" / "jobs.json").exists() or shutil.which("squeue") is None:
        return
    with contextlib.suppress(commands.Silent):
        refuse_active(run_dir)


def _keep(recipe: Recipe, run_dir: Path, directory: Path, scripts: dict[str, str]) -> None:
    """Write down what is submitted."""
    absolute = dataclasses.replace(recipe, run_dir=str(run_dir))
    text = dump(absolute)
    for path in (run_dir / "recipe.yaml", directory / "recipe.yaml"):
        with written(path) as file:
            file.write(text)
    for name, text in scripts.items():
        (directory / _file(name)).write_text(text, encoding="utf-8")
    kept = {
        name: value
        for name, value in sorted(os.environ.items())
        if _KEPT.fullmatch(name) and not slurm.secret(name, value)
    }
    packages = {
        str(d.metadata["Name"]): d.version for d in metadata.distributions() if d.metadata["Name"]
    }
    state.write_json(
        directory / "environment.json",
        {
            "time": time.time(),
            "user": getpass.getuser(),
            "host": socket.gethostname(),
            "code_revision": code_revision(),
            "versions": versions(),
            "python": sys.executable,
            "packages": dict(sorted(packages.items())),
            "environment": kept,
        },
    )


def _send(run_dir: Path, directory: Path, chosen: tuple[Stage, ...]) -> dict[str, str]:
    """Submit the scripts in order, each after those it waits for; if one fails, none."""
    numbers: dict[str, str] = {}
    record = jobs(run_dir)
    try:
        for stage in chosen:
            after = [numbers[need] for need in stage.needs if need in numbers]
            command = ["sbatch", "--parsable"]
            if after:
                command += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
            output = commands.call(
                *command, str(directory / _file(stage.name)), environment=commands.environment()
            )
            numbers[stage.name] = output.strip().partition(";")[0]
            record[stage.name] = {
                "job": numbers[stage.name],
                "key": stage.key,
                "submission": directory.name,
                "after": after,
            }
            state.write_json(directory / "jobs.json", numbers)
            state.write_json(run_dir / "slurm" / "jobs.json", record)
    except BaseException as error:
        commands.cancel(numbers.values())
        if isinstance(error, commands.Refused):
            where = f"{stage.name}: sbatch"
            raise UserError(where, str(error), "nothing was submitted; try again") from None
        raise
    return numbers


def jobs(run_dir: Path) -> dict[str, Any]:
    """The latest job of every stage: ``{stage: {"job", "key", "submission", "after"}}``."""
    return state.find_json(run_dir / "slurm" / "jobs.json") or {}


@contextlib.contextmanager
def _restored(*paths: Path) -> Iterator[None]:
    """The files as they were before, if the block fails."""
    former = {path: path.read_bytes() if path.exists() else None for path in paths}
    try:
        yield
    except BaseException:
        for path, content in former.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)
        raise


def _file(stage: str) -> str:
    return stage.replace(":", "-") + ".sbatch"


def _next(run_dir: Path) -> Path:
    """Directory of the coming submission."""
    taken = [int(p.name[7:]) for p in run_dir.glob("slurm/submit-*") if p.name[7:].isdigit()]
    return run_dir / "slurm" / f"submit-{max(taken, default=0) + 1}"


@contextlib.contextmanager
def _removed_unless_kept(run_dir: Path) -> Iterator[list[Path]]:
    """Make ``run_dir``. The directories added to the list are removed at the end, and with them
    what this has made on the way and is empty."""
    made = state.make(run_dir)
    added: list[Path] = []
    kept = False
    try:
        yield added
        kept = True
    finally:
        if not kept:
            for directory in added:
                shutil.rmtree(directory, ignore_errors=True)
            with contextlib.suppress(OSError):
                (run_dir / "slurm").rmdir()
            if made:
                (run_dir / "lock").unlink(missing_ok=True)
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()
