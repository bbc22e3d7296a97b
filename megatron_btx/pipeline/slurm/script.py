"""A stage as a batch script. Data in, text out; imports no torch and asks no Slurm.

A script is its ``#SBATCH`` lines, a few assignments, and ``batch.sh``, the same for all. The
templates in ``slurm/`` are made here as well:
``python -m megatron_btx.pipeline.slurm.script slurm``.

Every value of a recipe goes through ``quoted`` (a word of the shell) or ``flag`` (a word of a
``#SBATCH`` line, which Slurm reads without a shell), and control characters are refused before
(recipe/slurm.py): nothing in a recipe can run a command.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from megatron_btx.pipeline import prepare_array
from megatron_btx.pipeline.graph import Stage
from megatron_btx.recipe import slurm
from megatron_btx.recipe.schema import Recipe

_SAFE = re.compile(r"[A-Za-z0-9_@%+=:,./\[\]-]")
_SHEBANG = "#!/bin/bash"


def script(
    recipe: Recipe, stage: Stage, *, run_dir: Path, output: Path, python: str, token: str
) -> str:
    """The script of one stage.

    Args:
        stage: its key goes in, so that the job makes what was asked for when it was submitted.
        run_dir: absolute; the job runs there and reads its ``recipe.yaml``.
        output: where the script itself writes; the ranks' logs are in the stage's directory.
        python: interpreter of the ranks.
        token: what the run's directory must hold, as every node sees it (attempt.py).
    """
    settings = recipe.slurm
    lines = [
        _SHEBANG,
        f"# {stage.name} of {recipe.name}, written by `btx submit`.",
        *(f"#SBATCH {flag(word)}" for word in flags(recipe, stage, run_dir, output)),
        "",
    ]
    lines += [f"module load {quoted(module)}" for module in settings.modules]
    environment = slurm.resolve(recipe, stage.name).environment
    lines += [f"export {name}={quoted(str(value))}" for name, value in environment.items()]
    shape = slurm.shape(slurm.resolve(recipe, stage.name), stage.world_size, stage.num_threads)
    lines += [
        f"export BTX_SUBMISSION={quoted(token)} BTX_STAGE_KEY={quoted(stage.key)}",
        f"recipe={quoted(str(run_dir / 'recipe.yaml'))}",
        f"stage={_this(stage)}",
        f"python={quoted(python)}",
        f"cpus={shape.cpus_per_task}",
        f"launch=({' '.join(map(quoted, shlex.split(settings.launch_prefix)))})",
        "",
        body(),
    ]
    return "\n".join(lines)


def flags(recipe: Recipe, stage: Stage, run_dir: Path, output: Path) -> list[str]:
    """What the stage asks sbatch for, a word each."""
    job = slurm.resolve(recipe, stage.name)
    shape = slurm.shape(job, stage.world_size, stage.num_threads)
    words = [
        f"--job-name={job_name(recipe, stage.name)}",
        f"--chdir={run_dir}",
        *_output(recipe, stage, output),
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{recipe.slurm.signal_seconds}",
        f"--nodes={shape.nodes}",
        f"--ntasks={stage.world_size}",
        f"--ntasks-per-node={shape.ranks_per_node}",
        f"--cpus-per-task={shape.cpus_per_task}",
    ]
    if shape.gpus_per_node:
        kind = f"{job.gpu_type}:" if job.gpu_type else ""
        words.append(f"--gpus-per-node={kind}{shape.gpus_per_node}")
    for name in ("partition", "account", "qos", "constraint", "time", "mem"):
        value = getattr(job, name)
        if value is not None:
            words.append(f"--{name}={value}")
    return words + list(job.sbatch or ())


def _output(recipe: Recipe, stage: Stage, output: Path) -> list[str]:
    text = _literal(output)
    if stage.name != prepare_array.SHARDS:
        return [f"--output={text}"]
    return [
        f"--array=0-{prepare_array.tasks(recipe) - 1}",
        f"--output={text.removesuffix('.out')}-%a.out",
    ]


def _this(stage: Stage) -> str:
    """The stage, as the shell knows it: of an array each job is a part of its own."""
    number = '/"$SLURM_ARRAY_TASK_ID"' if stage.name == prepare_array.SHARDS else ""
    return quoted(stage.name) + number


def stem(name: str) -> str:
    """What the files of a stage are called in a submission's directory, without their ending."""
    return re.sub("[:/]", "-", name)


def job_name(recipe: Recipe, stage: str) -> str:
    """As ``squeue`` shows it; its first letters tell the stage."""
    return f"{stage}@{recipe.name}"


def quoted(text: str) -> str:
    """One word of the shell, in quotes whatever it is."""
    return "'" + text.replace("'", "'\"'\"'") + "'"


def flag(word: str) -> str:
    """One word of an ``#SBATCH`` line. Slurm takes a character after a backslash as it is, but for
    a blank, which ends a word that is not in quotes."""
    if all(map(_SAFE.fullmatch, word)):
        return word
    return '"' + "".join(c if _SAFE.fullmatch(c) else f"\\{c}" for c in word) + '"'


def _literal(path: Path) -> str:
    """A file name in which ``%`` is no pattern of Slurm's."""
    return str(path).replace("%", "%%")


def body() -> str:
    """What is the same for every stage."""
    return Path(__file__).with_name("batch.sh").read_text(encoding="utf-8")


_ABOUT = {
    "prepare": "Text to token files, and the tokenizer.",
    "seed": "The seed: the dense model that is branched.",
    "expert": "An expert: the seed trained on one domain, apart from all others.",
    "mix": "The mix of all experts, checked: every checkpoint whole, every tensor accounted "
    "for.\n# The weights themselves are mixed by the finetuning job, each rank what it holds.",
    "finetune": "The mixture of experts: mixed, and its routers taught.",
    "dense": "The data-matched dense baseline.",
    "evaluate": "Held-out loss of every model on every domain.",
    "export": "The finished mixture as a Hugging Face model, compared by its loss.",
    "report": "The table and the page.",
}


def template(kind: str) -> str:
    """The script of a kind of stage, for use by hand."""
    domain = kind == "expert"
    usage = f"sbatch [FLAGS] slurm/{kind}.sbatch RECIPE" + " DOMAIN" * domain
    parallel = kind in slurm.ON_GPUS
    lines = [
        _SHEBANG,
        f"# {_ABOUT[kind]}",
        "#",
        f"#   {usage}",
        "#",
        *(
            ["# FLAGS: --ntasks=RANKS (`btx plan RECIPE` says how many), --nodes, --gpus-per-node,"]
            if parallel
            else []
        ),
        f"# {'      ' if parallel else 'FLAGS:'} --partition, --account, --time, ...",
        "# `btx submit RECIPE` writes a script like this for every stage of a recipe.",
        f"#SBATCH --job-name={kind}",
        "#SBATCH --output=%x-%j.out",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@180",
        "",
        f"recipe=${{1:?usage: {usage}}}",
        f"stage=expert:${{2:?usage: {usage}}}" if domain else f'stage="{kind}"',
        "python=${BTX_PYTHON:-python3}",
        "cpus=${SLURM_CPUS_PER_TASK:-1}",
        "launch=() # a container: launch=(apptainer exec --nv image.sif), or flags of srun",
        "",
        body(),
    ]
    return "\n".join(lines)


def main(arguments: Iterable[str] | None = None) -> int:
    """Write all templates to a directory."""
    (directory,) = sys.argv[1:] if arguments is None else arguments
    for kind in slurm.KINDS:
        Path(directory, f"{kind}.sbatch").write_text(template(kind), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
