"""What each stage asks of Slurm, and what can be wrong with it before any Slurm is asked."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_btx.recipe.check_layout import Problem
from megatron_btx.recipe.schema import Recipe, SlurmJob
from megatron_btx.recipe.stages import expert_stage, imported, recipe_key

KINDS = ("prepare", "seed", "expert", "mix", "finetune", "dense", "evaluate", "export", "report")
ON_GPUS = ("seed", "expert", "finetune", "dense", "evaluate")
"""Those with a layout, whose ranks compute on GPUs."""

_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_FLAG = re.compile(r"--?([A-Za-z][A-Za-z-]*)")
_SECRET_NAME = re.compile(
    r"(^|_)(API_?KEY|ACCESS_?KEY|KEY|TOKEN|SECRET|PASSW(OR)?D|CREDENTIALS?)(_|$)"
)
_SECRET_VALUE = re.compile(
    r"[0-9a-f]{40}|hf_\w{20,}|wandb_v\d\w{20,}|gh[a-z]_\w{20,}|github_pat_\w{20,}|sk-[\w-]{20,}"
    r"|AKIA[0-9A-Z]{16}|xox[a-z]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]+\.[\w-]+|\w+://[^/\s:]+:[^/\s@]+@.*"
)

OURS = frozenset(
    ["array", "chdir", "cpus-per-task", "deadline", "dependency", "error", "export"]
    + ["export-file", "get-user-env", "gid", "gpus", "gpus-per-node", "gpus-per-task", "help"]
    + ["hold", "input", "job-name", "kill-on-invalid-dep", "nodes", "no-requeue", "ntasks"]
    + ["ntasks-per-node", "open-mode", "output", "parsable", "quiet", "requeue", "signal"]
    + ["test-only", "uid", "usage", "version", "wait", "wrap"]
    + ["account", "constraint", "mem", "partition", "qos", "time"]
    + list("aAcCdDeGhHiJnNopqQtVW")
)
"""Flags of sbatch that `btx submit` writes itself, or that would undo what it relies on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobShape:
    """How a stage's ranks lie over nodes."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_task: int


def resolve(recipe: Recipe, name: str) -> SlurmJob:
    """The Slurm settings of stage ``name``: the ``slurm:`` block, overridden by that of its kind,
    then by its own."""
    slurm, kind = recipe.slurm, name.partition(":")[0]
    layers = [slurm, *(slurm.stages[key] for key in _layers(kind, name) if key in slurm.stages)]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(SlurmJob):
        given = [getattr(layer, field.name) for layer in layers]
        if field.name == "environment":
            values[field.name] = {key: text for part in given for key, text in part.items()}
        else:
            values[field.name] = next((v for v in reversed(given) if v is not None), None)
    computes = kind in ON_GPUS and not (kind != "evaluate" and imported(recipe, name))
    if not computes and all(layer.gpus_per_node is None for layer in layers[1:]):
        values["gpus_per_node"] = None
    return SlurmJob(**values)


def _layers(kind: str, name: str) -> list[str]:
    return [kind] if kind == name else [kind, name]


def shape(job: SlurmJob, world_size: int, num_threads: int) -> JobShape:
    """Nodes, and ranks and GPUs on each, for a stage of ``world_size`` ranks.

    Raises:
        ValueError: the ranks do not divide over the nodes; says why.
    """
    gpus = job.gpus_per_node or 0
    nodes = job.nodes
    if nodes is None:
        nodes = -(-world_size // gpus) if gpus else 1
    if world_size % nodes:
        many = f"{gpus} GPUs" if job.nodes is None else "ranks"
        raise ValueError(f"{world_size} ranks do not divide over {nodes} nodes ({many} a node)")
    ranks = world_size // nodes
    if gpus and ranks > gpus:
        raise ValueError(f"{ranks} ranks a node, and a node has {gpus} GPUs")
    return JobShape(
        nodes=nodes,
        ranks_per_node=ranks,
        gpus_per_node=ranks if gpus else 0,
        cpus_per_task=job.cpus_per_task or num_threads,
    )


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Everything wrong with the ``slurm:`` block."""
    slurm = recipe.slurm
    yield from _job("slurm", slurm)
    for name, job in slurm.stages.items():
        key = f"slurm.stages.{name}"
        kind, _, domain = name.partition(":")
        if kind not in KINDS or (domain and (kind != "expert" or domain not in recipe.experts)):
            known = ", ".join([*KINDS, *map(expert_stage, recipe.experts)])
            yield Problem(key, "is no stage of this recipe", f"known: {known}")
        yield from _job(key, job)
        if job.tasks is not None and name != "prepare":
            yield _one_job(key)
    if slurm.tasks is not None:
        yield _one_job("slurm")
    for index, module in enumerate(slurm.modules):
        yield from _text(f"slurm.modules[{index}]", module)
        if module.startswith("-"):
            yield Problem(f"slurm.modules[{index}]", f"{module!r} is a flag", "name a module")
    if slurm.python is not None:
        yield from _text("slurm.python", slurm.python)
    if _CONTROL.search(slurm.launch_prefix):
        yield from _text("slurm.launch_prefix", slurm.launch_prefix)
    else:
        yield from _prefix("slurm.launch_prefix", slurm.launch_prefix)
    yield from _shapes(recipe)


def _one_job(key: str) -> Problem:
    what = "is for prepare alone: no other stage can be cut into an array of jobs"
    return Problem(f"{key}.tasks", what, "write `slurm: {stages: {prepare: {tasks: 64}}}`")


def _job(key: str, job: SlurmJob) -> Iterator[Problem]:
    for name in ("partition", "account", "qos", "constraint", "time", "gpu_type", "mem"):
        value = getattr(job, name)
        if value is not None:
            yield from _text(f"{key}.{name}", value)
    if job.time is not None and not _TIME.fullmatch(job.time):
        fix = 'write "days-hours:minutes:seconds" or "hours:minutes:seconds"'
        yield Problem(f"{key}.time", f"{job.time!r} is no time limit", fix)
    if job.mem is not None and not re.fullmatch(r"\d+[KMGT]?", job.mem):
        yield Problem(f"{key}.mem", f"{job.mem!r} is no amount of memory", 'write "200G"')
    if job.gpu_type is not None and not re.fullmatch(r"[\w.-]+", job.gpu_type):
        yield Problem(f"{key}.gpu_type", f"{job.gpu_type!r} is no type", "as `sinfo -o %G` says")
    for index, flag in enumerate(job.sbatch or ()):
        yield from _flag(f"{key}.sbatch", index, flag)
    for name, value in job.environment.items():
        yield from _variable(f"{key}.environment.{name}", name, value)


def _text(key: str, value: str) -> Iterator[Problem]:
    if not value.strip():
        yield Problem(key, "is empty", "give a value, or remove the key")
    elif _CONTROL.search(value):
        yield Problem(key, f"{value!r} has a line break or a control character", "remove it")


def _prefix(key: str, text: str) -> Iterator[Problem]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        yield Problem(key, str(error).lower(), "close the quotes")
        return
    if words and words[0].endswith(":"):
        yield Problem(
            key,
            f"begins with {words[0]!r}, which is no command and no flag of srun",
            f"leave it out: `launch_prefix: {' '.join(words[1:])}`",
        )
    for word in words:  # --env=NAME=VALUE,NAME=VALUE
        parts = [part.lstrip("-").replace("-", "_") for part in re.split("[=,]", word)]
        for name, value in zip(parts, [*parts[1:], ""], strict=True):
            if (value and _SECRET_NAME.search(name.upper())) or _SECRET_VALUE.fullmatch(name):
                fix = "the jobs inherit the environment from which you submit"
                yield Problem(key, "has a key or token in it, and scripts are kept", fix)


def _flag(key: str, index: int, flag: str) -> Iterator[Problem]:
    yield from _text(key, flag)
    match = _FLAG.match(flag)
    if match is None:
        yield Problem(key, f"{flag!r} is no flag", "write --name or --name=value")
        return
    name = match[1] if flag.startswith("--") else match[1][0]
    # sbatch takes any beginning of a flag's name that is no other's
    if name in OURS or (flag.startswith("--") and any(o.startswith(name) for o in OURS)):
        yield Problem(
            key, f"{flag!r} is btx's own to set", "use the recipe's keys, or leave it out"
        )
    elif secret(name.replace("-", "_"), flag.partition("=")[2]):
        yield Problem(key, f"--{name} looks like a key or token", "never write one into a recipe")


def _variable(key: str, name: str, value: Any) -> Iterator[Problem]:
    if not _NAME.fullmatch(name):
        yield Problem(key, f"{name!r} cannot name a variable", "use letters, digits and `_`")
    elif re.match(r"(SLURM|SBATCH|BTX)_", name) or name in ("PATH", "IFS", "BASH_ENV", "ENV"):
        yield Problem(key, f"{name} is not the recipe's to set", "remove it")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        yield Problem(key, f"is {value!r}, not text", "put it in quotes")
    elif isinstance(value, str) and _CONTROL.search(value):
        yield Problem(key, "has a line break or a control character", "remove it")
    elif secret(name, str(value)):
        yield Problem(
            key,
            "looks like a key or token, and scripts are kept",
            f"`export {name}=...` in the shell from which you submit: the jobs inherit it",
        )


def printable(text: str) -> bool:
    """Whether a path can stand in a line of a script: no line break, no control character."""
    return _CONTROL.search(text) is None


def secret(name: str, value: str) -> bool:
    """Whether a variable or an option must not be written anywhere."""
    return bool(_SECRET_NAME.search(name.upper())) or bool(_SECRET_VALUE.fullmatch(value))


def _shapes(recipe: Recipe) -> Iterator[Problem]:
    layouts = {
        "seed": recipe.seed.layout,
        **{expert_stage(name): block.layout for name, block in recipe.experts.items()},
        "finetune": recipe.finetune.layout,
        "evaluate": recipe.evaluate.layout,
    }
    if recipe.dense is not None:
        layouts["dense"] = recipe.dense.layout
    for name, layout in layouts.items():
        job = resolve(recipe, name)
        try:
            shape(job, layout.world_size, layout.num_threads)
        except ValueError as error:
            key = recipe_key(name)
            fix = "change the layout, `gpus_per_node` or `nodes`"
            yield Problem(f"{key}.layout", str(error), fix)
