"""What is asked of the cluster before anything is submitted: whether each stage fits its partition,
whether Slurm would take its script, whether a node sees the run's directory and the package.
Imports no torch."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.slurm import attempt, commands, script
from megatron_btx.recipe import slurm
from megatron_btx.recipe.schema import Recipe


def fits(recipe: Recipe, chosen: tuple[Stage, ...], there: list[commands.Nodes]) -> None:
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
    shape: slurm.JobShape,
    nodes: list[commands.Nodes],
    there: list[commands.Nodes],
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
    wanted, most_minutes = commands.minutes(limit or ""), nodes[0].limit
    if wanted is not None and most_minutes is not None and wanted > most_minutes:
        what = f"{limit} is more than {name} allows ({most_minutes:g} minutes)"
        return "slurm.time", what, "lower it: a stage goes on after a requeue"
    return None


def accepted(scripts: dict[str, str]) -> list[str]:
    """Ask Slurm about every script (``sbatch --test-only``). It refuses, in the same words, what no
    node could run and what only now none can (nodes are down, drained, reserved): then sbatch is
    asked itself, with a job that is held and cancelled at once.

    Returns:
        What it would let wait, and why.

    Raises:
        Silent: the controller does not answer.
        UserErrors: all that it would refuse.
    """
    errors, notes = [], []
    environment = commands.environment()
    for name, text in scripts.items():
        try:
            commands.call("sbatch", "--test-only", text=text, environment=environment)
        except commands.Refused as error:
            commands.check_answers()
            try:
                held = commands.call(
                    "sbatch", "--parsable", "--hold", text=text, environment=environment
                )
            except commands.Refused as real:
                errors.append(UserError(f"{name}: sbatch", str(real), "change the `slurm:` block"))
            else:
                commands.cancel([held.strip().partition(";")[0]])
                notes.append(f"{name}: Slurm lets it wait ({error}); see `sinfo -R`")
    if errors:
        raise UserErrors(errors)
    return notes


def probe(recipe: Recipe, run_dir: Path, chosen: tuple[Stage, ...], token: str) -> list[str]:
    """Run a job on a node of every partition that looks for the run's directory and starts Python.

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
        where = [f"--{name}={value}" for name, value in place.items()]
        where += [word for word in job.sbatch or () if _says_where(word)]
        if tuple(where) in seen:
            continue
        seen.add(tuple(where))
        problem = _probe_one(recipe, run_dir, where, token)
        if problem is not None:
            notes.append(f"{job.partition or 'the default partition'}: not probed ({problem})")
    return notes


_WHERE = ("exclude", "nodelist", "nodefile", "reservation", "clusters", "prefer")
"""Options of sbatch that say where a job runs: srun has them, too."""
_WHERE_SHORT = "xwFM"


def _says_where(option: str) -> bool:
    """Whether a word of ``slurm.sbatch`` is one of those. Slurm takes the beginning of a name."""
    if not option.startswith("--"):
        return option[1:2] in _WHERE_SHORT
    name = option[2:].partition("=")[0]
    return any(whole.startswith(name) for whole in _WHERE)


def _probe_one(recipe: Recipe, run_dir: Path, where: list[str], token: str) -> str | None:
    python = recipe.slurm.python or sys.executable
    command = ["srun", "--immediate=20", "--nodes=1", "--ntasks=1", "--time=2", "--quiet"]
    command += ["--job-name=" + script.job_name(recipe, "probe"), "--chdir=/"]
    command += where
    command += [*shlex.split(recipe.slurm.launch_prefix), python]
    command += [
        "-m",
        "megatron_btx.pipeline.slurm.attempt",
        "--probe",
        str(run_dir / attempt.TOKEN),
        token,
    ]
    extra = slurm.resolve(recipe, "probe").environment
    environment = commands.environment() | {name: str(value) for name, value in extra.items()}
    try:
        commands.call(*command, environment=environment)
    except commands.Refused as error:
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
