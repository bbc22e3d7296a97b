"""Several recipes as one graph of jobs that ends in their comparison. Imports no torch.

What two of them have in common (a stage of one name and key) is one job, the first one's; in the
other's directory it is a link to the first one's, made before there is anything in it, and what
waits for it there waits for that job. The last job sets all of them side by side (``btx compare``,
which finds nothing left to run), in a directory of its own:

<out>/slurm/compare.sbatch, compare.out, compare.json    the script, what it says, its job
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_btx.errors import UserError
from megatron_btx.files import find_json, write_json, written
from megatron_btx.pipeline import graph, prepare_array, state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.slurm import commands, script, submit
from megatron_btx.pipeline.slurm.status_table import StageStatus
from megatron_btx.recipe import slurm
from megatron_btx.recipe.schema import Recipe

COMPARE = "compare"
"""Name of the last job, and of its files."""

_OWN = ("evaluate", "export", "report", *graph.LOOKS_AHEAD)
"""Kinds that every run has for itself (state.link_shared)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One recipe of the comparison."""

    recipe: Recipe
    run_dir: Path
    """Absolute."""
    stages: tuple[Stage, ...]
    chosen: tuple[Stage, ...] = ()
    """What is submitted for it."""
    taken: Mapping[str, Path] = field(default_factory=dict)
    """Stages that another member makes, and its run's directory."""


def arrange(members: Sequence[Member]) -> list[Member]:
    """Who submits what: each stage that is left, the first one that has it.

    Args:
        members: without ``chosen`` and ``taken``, in the order in which they are submitted.
    """
    makers: dict[tuple[str, str], Path] = {}
    found = []
    for member in members:
        left = state.left(member.run_dir, member.stages)
        taken = {
            stage.name: makers[stage.name, stage.key]
            for stage in left
            if stage.kind not in _OWN and (stage.name, stage.key) in makers
        }
        own = tuple(stage for stage in left if stage.name not in taken)
        # Also of what is done: a later member links it.
        for stage in member.stages:
            if stage.name not in taken:
                makers.setdefault((stage.name, stage.key), member.run_dir)
        found.append(dataclasses.replace(member, chosen=own, taken=taken))
    return found


def submit_all(
    members: Sequence[Member], out: Path, *, probe: bool = True
) -> tuple[dict[Path, dict[str, str]], str, list[str]]:
    """Submit what :func:`arrange` says, and the comparison; all or none.

    Args:
        members: arranged.
        out: where the comparison goes; absolute.
        probe: let a node look at each run's directory.

    Returns:
        Job numbers by run's directory and stage, the comparison's job, and what a person should
        know.

    Raises:
        UserError: as of :func:`submit.submit`; no job is left in the queue.
    """
    numbers: dict[Path, dict[str, str]] = {}
    notes: list[str] = []
    try:
        for member in members:
            state.make(member.run_dir)
            link(member)
            others = {
                name: numbers[maker][name]
                for name, maker in member.taken.items()
                if name in numbers[maker]
            }
            numbers[member.run_dir] = others
            if member.chosen:
                chosen = prepare_array.expand(member.recipe, member.chosen)
                sent, more = submit.submit(
                    member.recipe, member.run_dir, chosen, probe=probe, others=others
                )
                numbers[member.run_dir] = {**others, **sent}
                notes += more
        last = [numbers[m.run_dir].get(m.stages[-1].name) for m in members]
        return numbers, _compare(members, out, [job for job in last if job]), notes
    except BaseException as error:
        sent_jobs = {job for of_run in numbers.values() for job in of_run.values()}
        commands.cancel(sent_jobs)
        if isinstance(error, commands.Refused):
            what, fix = str(error), "nothing was submitted; try again"
            raise UserError(f"{COMPARE}: sbatch", what, fix) from None
        raise


def link(member: Member) -> None:
    """Link into this recipe's run directory the stages that another recipe of the group makes."""
    for name, maker in member.taken.items():
        directory = graph.find(member.stages, name).directory
        here, there = member.run_dir / directory, maker / directory
        if here.is_symlink():
            here.unlink()
        elif here.exists():
            what = f"already holds a stage that this submission makes in {there}"
            raise UserError(str(here), what, "remove it, or submit its recipe alone")
        here.symlink_to(os.path.relpath(there, member.run_dir))


def _compare(members: Sequence[Member], out: Path, after: Sequence[str]) -> str:
    """Submit the comparison behind the last stage of each; its job's number."""
    place = out / "slurm"
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{COMPARE}.sbatch"
    with written(path) as file:
        file.write(compare_script(members, out))
    command = ["sbatch", "--parsable"]
    if after:
        command += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    answer = commands.call(*command, str(path), environment=commands.environment())
    number = answer.strip().partition(";")[0]
    write_json(place / f"{COMPARE}.json", {"job": number, "after": list(after)})
    return number


def compare_script(members: Sequence[Member], out: Path) -> str:
    """The script of the comparison: one task, with what the first recipe's ``report`` asks for."""
    recipe = members[0].recipe
    job = slurm.resolve(recipe, "report")
    words = [
        f"--job-name={COMPARE}@{out.name}",
        f"--chdir={out}",
        f"--output={out / 'slurm' / COMPARE}.out".replace("%", "%%"),
        "--open-mode=append",
        "--ntasks=1",
        f"--cpus-per-task={job.cpus_per_task or 1}",
    ]
    for name in ("partition", "account", "qos", "constraint", "time", "mem"):
        value = getattr(job, name)
        if value is not None:
            words.append(f"--{name}={value}")
    words += list(job.sbatch or ())
    recipes = [script.quoted(str(member.run_dir / "recipe.yaml")) for member in members]
    settings = recipe.slurm
    launch = " ".join(script.quoted(word) for word in shlex.split(settings.launch_prefix))
    python = script.quoted(settings.python or sys.executable)
    lines = [
        "#!/bin/bash",
        f"# The comparison of {len(members)} runs, written by `btx submit`.",
        *(f"#SBATCH {script.flag(word)}" for word in words),
        "",
        *(f"module load {script.quoted(module)}" for module in settings.modules),
        *(f"export {k}={script.quoted(str(v))}" for k, v in job.environment.items()),
        "export SLURM_EXPORT_ENV=ALL",
        f"exec srun --ntasks=1 {launch} {python} -m megatron_btx.cli compare \\",
        *(f"  {recipe} \\" for recipe in recipes),
        f"  --out {script.quoted(str(out))}",
    ]
    return "\n".join(lines) + "\n"


def row(out: Path) -> StageStatus | None:
    """Where the comparison in ``out`` stands; ``None`` where none was submitted."""
    record = find_json(out / "slurm" / f"{COMPARE}.json")
    if record is None:
        return None
    number = str(record.get("job"))
    job = commands.show(number)
    if job is not None and job.active:
        waits = job.reason if job.state == "PENDING" else ""
        return StageStatus(
            stage=COMPARE, job=number, state=job.state.lower(), active=True, note=waits
        )
    if (out / "compare.json").exists():
        return StageStatus(stage=COMPARE, job=number, state="done")
    word = "ended" if job is None else job.state.lower()
    said = f"see {out / 'slurm' / 'compare.out'}"
    return StageStatus(stage=COMPARE, job=number, state=word, note=said)
