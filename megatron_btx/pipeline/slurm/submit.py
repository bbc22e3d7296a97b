"""Stages as Slurm jobs: submitted all or none, written down, found again. Imports no torch.

Which stages is for cli/slurm.py to say, whether the cluster would run them for preflight.py, and
what a script says is script.py's.

<run_dir>/slurm/token           by which every job knows the directory it was submitted from
<run_dir>/slurm/jobs.json       stage -> its latest job
<run_dir>/slurm/submit-<n>/     what a submission was: scripts, recipe, code, environment, jobs
<run_dir>/slurm/submit-<n>/<stage>.out      what the batch script says, over all requeues
                                (``prepare-shards-<task>.out`` of an array)

A run directory belongs to one submission at a time. While it submits, it holds the lock that
``btx run`` takes as well (locks.py); afterwards its jobs are the lock, whoever submitted them and
however (run_jobs.py). Neither outlives a crash.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.files import written
from megatron_btx.pipeline import locks, prepare_array, state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.slurm import attempt, commands, preflight, run_jobs, script
from megatron_btx.provenance import code_revision, versions
from megatron_btx.recipe import slurm
from megatron_btx.recipe.load import dump_kept
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
            output=directory / f"{script.stem(stage.name)}.out",
            python=python,
            token=token,
        )
        for stage in chosen
    }


def dry_run(
    recipe: Recipe, run_dir: Path, chosen: tuple[Stage, ...], *, whole: bool = False
) -> str:
    """What ``submit`` would send: the graph, and what each script asks Slurm for.

    Args:
        recipe: what would be submitted.
        run_dir: the recipe's.
        chosen: the stages.
        whole: the scripts themselves, too; but for these lines they are the same for every stage.
    """
    run_dir = run_dir.absolute()
    scripts = prepared(recipe, run_dir, chosen, _next(run_dir), "0" * 32)
    lines = ["##### the graph", *graph_lines(recipe, chosen)]
    for stage in chosen:
        if (place := state.find_shared(run_dir, stage, recipe.share)) is not None:
            lines.append(f"{stage.name}: its job only makes a link to {place}")
    for name, text in scripts.items():
        lines += ["", f"##### {name}"]
        lines += [line for line in text.split("\n") if line.startswith("#SBATCH ")]
    if not whole:
        lines += ["", "`--scripts` prints every script whole"]
    for name, text in scripts.items() if whole else ():
        lines += ["", f"##### {_file(name)}", text.rstrip("\n")]
    return "\n".join(lines) + "\n"


def graph_lines(recipe: Recipe, chosen: tuple[Stage, ...]) -> list[str]:
    """A line a job: its size and what it waits for."""
    names = {stage.name for stage in chosen}
    width = max((len(stage.name) for stage in chosen), default=0)
    lines = []
    for stage in chosen:
        job = slurm.resolve(recipe, stage.name)
        shape = slurm.shape(job, stage.world_size, stage.num_threads)
        tasks = (
            f"{prepare_array.tasks(recipe)} jobs of " if stage.name == prepare_array.SHARDS else ""
        )
        gpus = f", {shape.gpus_per_node} GPUs each" if shape.gpus_per_node else ""
        size = f"{tasks}{shape.nodes} node{'s' * (shape.nodes > 1)} x {shape.ranks_per_node}{gpus}"
        after = ", ".join(need for need in stage.needs if need in names)
        lines.append(f"{stage.name:<{width}}  {size:<12}  {after and 'after ' + after}".rstrip())
    return lines


def submit(
    recipe: Recipe,
    run_dir: Path,
    chosen: tuple[Stage, ...],
    *,
    probe: bool = True,
    others: Mapping[str, str] | None = None,
) -> tuple[dict[str, str], list[str]]:
    """Submit the chosen stages, all or none.

    Args:
        recipe: of the run.
        run_dir: its directory.
        chosen: the stages.
        probe: let a node look at the directory.
        others: jobs of other runs that make stages of this one, by stage.

    Returns:
        Job numbers by stage, and what a person should know.

    Raises:
        UserError: another submission or run has the directory, the cluster cannot run a stage, or
            Slurm refuses one. Nothing is left in the queue or on the disk.
    """
    run_dir = run_dir.absolute()
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(_removed_unless_kept(run_dir))
        stack.enter_context(locks.run_lock(run_dir))
        run_jobs.refuse_active(run_dir, chosen)
        preflight.fits(recipe, chosen, commands.nodes())
        token, directory = uuid.uuid4().hex, _next(run_dir)
        scripts = prepared(recipe, run_dir, chosen, directory, token)
        try:
            notes = preflight.accepted(scripts)
        except KeyboardInterrupt:  # perhaps while a job was there that is held for a trial
            _take_back(run_dir, chosen, {})
            raise
        directory.mkdir(parents=True)
        made.append(directory)
        with _restored(*(run_dir / name for name in _WRITTEN)):
            with written(run_dir / attempt.TOKEN) as file:
                file.write(token)
            if probe:
                notes += preflight.probe(recipe, run_dir, chosen, token)
            _keep(recipe, run_dir, directory, scripts)
            numbers = _send(recipe, run_dir, directory, chosen, others or {})
        made.clear()
    return numbers, notes


def refuse_beside_jobs(run_dir: Path, stages: tuple[Stage, ...]) -> None:
    """For a run on this machine: ``run_jobs.refuse_active``, where Slurm is there to be asked.

    Raises:
        UserError: jobs of this run are in the queue.
    """
    in_jobs = any(run_jobs.begun(run_dir / stage.directory) for stage in stages)
    if not (in_jobs or run_jobs.submitted(run_dir)) or shutil.which("squeue") is None:
        return
    with contextlib.suppress(commands.Silent):
        run_jobs.refuse_active(run_dir, stages)


def _keep(recipe: Recipe, run_dir: Path, directory: Path, scripts: dict[str, str]) -> None:
    """Write down what is submitted."""
    text = dump_kept(recipe, run_dir)
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
            "user": commands.me(),
            "host": socket.gethostname(),
            "code_revision": code_revision(),
            "versions": versions(),
            "python": sys.executable,
            "packages": dict(sorted(packages.items())),
            "environment": kept,
        },
    )


def _send(
    recipe: Recipe,
    run_dir: Path,
    directory: Path,
    chosen: tuple[Stage, ...],
    others: Mapping[str, str],
) -> dict[str, str]:
    """Submit the scripts in order, each after those it waits for; if one fails, none."""
    numbers: dict[str, str] = {}
    record: dict[str, Any] = dict(run_jobs.submitted(run_dir))
    try:
        for stage in chosen:
            known = {**others, **numbers}
            after = [known[need] for need in stage.needs if need in known]
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
            if stage.name == prepare_array.SHARDS:
                record[stage.name]["tasks"] = prepare_array.tasks(recipe)
            state.write_json(directory / "jobs.json", numbers)
            state.write_json(run_dir / "slurm" / "jobs.json", record)
    except BaseException as error:
        _take_back(run_dir, chosen, numbers)
        if isinstance(error, commands.Refused):
            where = f"{stage.name}: sbatch"
            raise UserError(where, str(error), "nothing was submitted; try again") from None
        raise
    return numbers


def _take_back(run_dir: Path, chosen: tuple[Stage, ...], numbers: dict[str, str]) -> None:
    """Cancel what was sent, and what Slurm took without our hearing of it: before this there was no
    job of the run.

    Raises:
        UserError: the controller does not answer, and jobs are left.
    """
    try:
        unheard = [job.number for job in run_jobs.active(run_dir, chosen)]
        commands.cancel({*numbers.values(), *unheard})
    except commands.Silent as error:
        sent = ", ".join(f"{number} ({name})" for name, number in numbers.items()) or "perhaps one"
        raise UserError(
            "slurmctld",
            f"has stopped answering ({error.what}), and jobs are left in the queue: {sent}",
            "once it answers: `btx cancel`, then submit again",
        ) from None


@contextlib.contextmanager
def _restored(*paths: Path) -> Iterator[None]:
    """The files as they were before, if the block fails. They are kept under other names meanwhile:
    a full disk would have no room to write them anew."""
    former = {path: path.with_name(f".{path.name}.former.{os.getpid()}.tmp") for path in paths}
    try:
        for path, kept in former.items():
            if path.exists():
                _keep_as(path, kept)
        yield
    except BaseException:
        for path, kept in former.items():
            if kept.exists():
                os.replace(kept, path)
            else:
                path.unlink(missing_ok=True)
        raise
    finally:
        for kept in former.values():
            kept.unlink(missing_ok=True)


def _keep_as(path: Path, kept: Path) -> None:
    try:
        os.link(path, kept)
    except OSError:  # a file system without hard links
        shutil.copy2(path, kept)


def _file(stage: str) -> str:
    return f"{script.stem(stage)}.sbatch"


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
