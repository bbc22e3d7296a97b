"""Stages as Slurm jobs: select, check, submit, cancel. Imports no torch.

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
import shlex
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.pipeline import begin, cluster, graph, sbatch, state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.recipe import slurm
from megatron_btx.recipe.load import dump
from megatron_btx.recipe.schema import Recipe
from megatron_btx.versions import code_revision, versions

_KEPT = re.compile(
    r"(CUDA|NCCL|GLOO|OMP|MKL|UCX|FI|TORCH|PYTORCH|CONDA|LMOD|NVTE|HF|WANDB|TRITON)_.*|CUDA\w*"
    r"|PATH|PYTHONPATH|LD_LIBRARY_PATH|LOADEDMODULES|VIRTUAL_ENV|HOSTNAME|LANG|TZ"
)
"""Environment variables that are written down, unless they look like a key."""


def select(
    stages: tuple[Stage, ...],
    *,
    only: Iterable[str] = (),
    first: str | None = None,
    last: str | None = None,
) -> tuple[Stage, ...]:
    """The stages that are wished for.

    Args:
        only: these, by stage (``expert:math``) or kind (``expert``).
        first: this one and all that wait for it.
        last: this one and all that it waits for.

    Raises:
        UserError: there is no such stage.
    """
    chosen = {stage.name for stage in stages}
    only = tuple(only)
    if only:
        chosen = {name for wish in only for name in _named(stages, wish, "--only")}
    if first is not None:
        behind = _named(stages, first, "--from")
        for stage in stages:
            if behind.intersection(stage.needs):
                behind.add(stage.name)
        chosen &= behind
    if last is not None:
        before: set[str] = set()
        for name in _named(stages, last, "--until"):
            before |= {stage.name for stage in graph.until(stages, name)}
        chosen &= before
    return tuple(stage for stage in stages if stage.name in chosen)


def _named(stages: tuple[Stage, ...], wish: str, option: str) -> set[str]:
    names = {stage.name for stage in stages if wish in (stage.name, stage.name.partition(":")[0])}
    if not names:
        known = ", ".join(stage.name for stage in stages)
        raise UserError(option, f"there is no stage {wish}", f"choose {known}")
    return names


def to_submit(run_dir: Path, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Those that are not done; the mix only where the finetuning is not."""
    left = state.left(run_dir, stages)
    finetune = any(stage.kind == "finetune" for stage in left)
    chosen = any(stage.kind == "finetune" for stage in stages)
    return tuple(s for s in left if s.kind != "mix" or finetune or not chosen)


def check_needs(run_dir: Path, stages: tuple[Stage, ...], chosen: tuple[Stage, ...]) -> None:
    """That everything a chosen stage waits for is done or chosen too.

    Raises:
        UserErrors: all that is missing.
    """
    coming = {stage.name for stage in chosen}
    errors = []
    for stage in chosen:
        needs = [other for other in stages if other.name in stage.needs and other.kind != "mix"]
        missing = [n.name for n in state.left(run_dir, tuple(needs)) if n.name not in coming]
        if missing:
            what = f"needs {', '.join(missing)}, not done and not among what is submitted"
            errors.append(UserError(stage.name, what, "select those as well"))
    if errors:
        raise UserErrors(errors)


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
        stage.name: sbatch.script(
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
        fits(recipe, chosen, cluster.nodes())
        token, directory = uuid.uuid4().hex, _next(run_dir)
        scripts = prepared(recipe, run_dir, chosen, directory, token)
        _test(scripts)
        directory.mkdir(parents=True)
        undo.append(directory)
        former = (run_dir / begin.TOKEN).read_bytes() if (run_dir / begin.TOKEN).exists() else None
        (run_dir / begin.TOKEN).write_text(token, encoding="utf-8")
        try:
            notes = _probe(recipe, run_dir, chosen, token) if probe else []
        except UserError:
            if former is None:
                (run_dir / begin.TOKEN).unlink()
            else:
                (run_dir / begin.TOKEN).write_bytes(former)
            raise
        _keep(recipe, run_dir, directory, scripts)
        jobs = _send(run_dir, directory, chosen)
        undo.clear()
    return jobs, notes


def refuse_active(run_dir: Path) -> None:
    """That no job of this run is in the queue.

    Raises:
        UserError: some are.
    """
    active = cluster.queued(str(run_dir))
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
    with contextlib.suppress(cluster.Silent):
        refuse_active(run_dir)


def fits(recipe: Recipe, chosen: tuple[Stage, ...], there: list[cluster.Nodes]) -> None:
    """That each stage fits its partition.

    Raises:
        UserErrors: all that do not.
    """
    errors = []
    for stage in chosen:
        job = slurm.resolve(recipe, stage.name)
        shape = slurm.shape(job, stage.world_size, stage.num_threads)
        nodes = [
            n for n in there if n.partition == job.partition or (not job.partition and n.default)
        ]
        problem = _misfit(job.partition, job.time, shape, nodes, there)
        if problem is not None:
            errors.append(UserError(f"{stage.name}: {problem[0]}", problem[1], problem[2]))
    if errors:
        raise UserErrors(errors)


def _misfit(
    partition: str | None,
    limit: str | None,
    shape: slurm.Shape,
    nodes: list[cluster.Nodes],
    there: list[cluster.Nodes],
) -> tuple[str, str, str] | None:
    """Key, what and fix of the first thing that does not fit."""
    if not nodes:
        known = ", ".join(sorted({n.partition for n in there})) or "none"
        what = (
            f"there is no partition {partition}" if partition else "there is no default partition"
        )
        return "slurm.partition", what, f"choose one of: {known}"
    name = nodes[0].partition
    cpus = shape.ranks_per_node * shape.cpus_per_task
    enough = [n for n in nodes if n.gpus >= shape.gpus_per_node]
    if not enough:
        most = max(n.gpus for n in nodes)
        what = f"{shape.gpus_per_node} GPUs a node, and no node of {name} has more than {most}"
        return "slurm.gpus_per_node", what, "lower it, or choose another partition"
    enough = [n for n in enough if n.cpus >= cpus]
    if not enough:
        most = max(n.cpus for n in nodes)
        what = f"{cpus} cores a node, and no node of {name} has more than {most}"
        return "slurm.cpus_per_task", what, "lower it or `num_threads`, or spread over more `nodes`"
    count = sum(n.count for n in enough)
    if count < shape.nodes:
        what = f"{shape.nodes} nodes, and {name} has {count} that would do"
        return "slurm.nodes", what, "choose another partition, or a smaller layout"
    wanted, most_minutes = cluster.minutes(limit or ""), nodes[0].limit
    if wanted is not None and most_minutes is not None and wanted > most_minutes:
        what = f"{limit} is more than {name} allows ({most_minutes:g} minutes)"
        return "slurm.time", what, "lower it: a stage goes on after a requeue"
    return None


def _test(scripts: dict[str, str]) -> None:
    """Ask Slurm about every script (``sbatch --test-only``).

    Raises:
        UserErrors: all that it would refuse.
    """
    errors = []
    for name, text in scripts.items():
        try:
            cluster.call("sbatch", "--test-only", text=text, environment=cluster.environment())
        except cluster.Refused as error:
            errors.append(UserError(f"{name}: sbatch", str(error), "change the `slurm:` block"))
    if errors:
        raise UserErrors(errors)


def _probe(recipe: Recipe, run_dir: Path, chosen: tuple[Stage, ...], token: str) -> list[str]:
    """Let a node of every partition look at the run's directory and start the interpreter.

    Returns:
        What could not be found out: nothing is free at the moment.

    Raises:
        UserError: the node does not see the directory, or not the package.
    """
    notes = []
    seen = set()
    for stage in chosen:
        job = slurm.resolve(recipe, stage.name)
        place = {
            name: value
            for name in ("partition", "account", "qos", "constraint")
            if (value := getattr(job, name)) is not None
        }
        if tuple(place.items()) in seen:
            continue
        seen.add(tuple(place.items()))
        problem = _probe_one(recipe, run_dir, place, token)
        if problem is not None:
            notes.append(f"{job.partition or 'the default partition'}: not probed ({problem})")
    return notes


def _probe_one(recipe: Recipe, run_dir: Path, place: dict[str, str], token: str) -> str | None:
    python = recipe.slurm.python or sys.executable
    command = ["srun", "--immediate=20", "--nodes=1", "--ntasks=1", "--time=2", "--quiet"]
    command += ["--job-name=" + sbatch.job_name(recipe, "probe"), "--chdir=/"]
    command += [f"--{name}={value}" for name, value in place.items()]
    command += [*shlex.split(recipe.slurm.launch_prefix), python]
    command += ["-m", "megatron_btx.pipeline.begin", "--probe", str(run_dir / begin.TOKEN), token]
    extra = slurm.resolve(recipe, "probe").environment
    environment = cluster.environment() | {name: str(value) for name, value in extra.items()}
    try:
        cluster.call(*command, environment=environment)
    except cluster.Refused as error:
        text = str(error)
        if re.search(
            r"Unable to allocate|busy|queued|not available|Immediate", text, re.IGNORECASE
        ):
            return text
        if "does not share" in text:
            host = re.search(r"the node (\S+)", text)
            raise UserError(
                str(run_dir),
                f"the node {host[1] if host else ''} does not share this directory",
                "give a `run_dir:` on a file system that all nodes mount",
            ) from None
        raise UserError(
            f"{python} on the nodes",
            text,
            "give `slurm.python`: an interpreter with megatron_btx that the nodes (or the "
            "container of `launch_prefix`) have",
        ) from None
    return None


def _keep(recipe: Recipe, run_dir: Path, directory: Path, scripts: dict[str, str]) -> None:
    """Write down what is submitted."""
    absolute = dataclasses.replace(recipe, run_dir=str(run_dir))
    text = dump(absolute)
    for path in (run_dir / "recipe.yaml", directory / "recipe.yaml"):
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    for name, script in scripts.items():
        (directory / _file(name)).write_text(script, encoding="utf-8")
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
    former = jobs(run_dir)
    record = dict(former)
    try:
        for stage in chosen:
            after = [numbers[need] for need in stage.needs if need in numbers]
            command = ["sbatch", "--parsable"]
            if after:
                command += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
            output = cluster.call(
                *command, str(directory / _file(stage.name)), environment=cluster.environment()
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
        cluster.cancel(numbers.values())
        state.write_json(run_dir / "slurm" / "jobs.json", former)
        if isinstance(error, cluster.Refused):
            where = f"{stage.name}: sbatch"
            raise UserError(where, str(error), "nothing was submitted; try again") from None
        raise
    return numbers


def jobs(run_dir: Path) -> dict[str, Any]:
    """The latest job of every stage: ``{stage: {"job", "key", "submission", "after"}}``."""
    return state.read_json(run_dir / "slurm" / "jobs.json") or {}


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
    made = []
    path = run_dir
    while not path.exists():
        made.append(path)
        path = path.parent
    run_dir.mkdir(parents=True, exist_ok=True)
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
