"""What can be known to be wrong with a run before anything is written. Imports no torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_btx.errors import UserError, UserErrors, collect_errors, errors_of
from megatron_btx.pipeline import graph, import_checkpoint
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.local import run_stages
from megatron_btx.recipe import check as recipe_check
from megatron_btx.recipe import check_paths, run_plan
from megatron_btx.recipe.load import KEPT, dump, dump_kept, is_run
from megatron_btx.recipe.run_plan import human
from megatron_btx.recipe.schema import Recipe
from megatron_btx.recipe.stages import directory as stage_directory
from megatron_btx.recipe.stages import recipe_key, stage_of_key
from megatron_btx.recipe.yaml_tree import read_tree
from megatron_btx.weights.find_checkpoint import find_checkpoint

_READ_AHEAD = 2 << 30
"""Bytes of users' text that are read before the run, over all files; what is behind them is read
when they are tokenized."""


def check(recipe: Recipe, run_dir: Path, left: tuple[Stage, ...], gpus: int | None) -> None:
    """Look at everything that the stages still left will need.

    Args:
        recipe: it has been read without an error.
        run_dir: where it will be run; need not exist.
        left: the stages that are not done.
        gpus: GPUs of this machine; ``None``: it is not this one that will run them.

    Raises:
        UserErrors: all that is wrong. Nothing has been written.
    """
    check_paths.files(recipe)
    errors: list[UserError] = []
    if gpus is not None:
        for stage in left:
            with collect_errors(errors):
                _machine(recipe, stage, gpus)
    with collect_errors(errors):
        check_inputs((recipe, run_dir, left))
    if any(stage.kind == "prepare" for stage in left):
        from megatron_btx.data import prepare

        with collect_errors(errors):
            prepare.check(recipe, most=_READ_AHEAD // max(1, _files(recipe)))
    with collect_errors(errors):
        _space(recipe, run_dir, left)
    if errors:
        raise UserErrors(errors)


def check_inputs(*runs: tuple[Recipe, Path, tuple[Stage, ...]]) -> None:
    """What is read in a moment, of any number of runs, each with the stages that are left: that
    what their recipes name is there, that checkpoints which they take are of their models, and that
    finished stages still have theirs.

    Raises:
        UserErrors: all that is wrong.
    """
    check_paths.files(*(recipe for recipe, _, left in runs if left))
    errors: list[UserError] = []
    for recipe, run_dir, left in runs:
        with collect_errors(errors):
            import_checkpoint.check_all(recipe, left)
        with collect_errors(errors):
            _sources(run_dir, left)
        if any(stage.kind in ("mix", "finetune") for stage in left):
            with collect_errors(errors):
                check_centroids(recipe)
    if errors:
        raise UserErrors(list({str(error): error for error in errors}.values()))


def check_centroids(recipe: Recipe) -> None:
    """That the file of centroids that the recipe names, if it does, is of its experts and model.

    Raises:
        UserErrors: it is not, or is no such file.
    """
    if recipe.mix.centroids is None:
        return
    from megatron_btx.mix.plans import router_of

    with errors_of("mix.centroids"):
        router_of(recipe.mix, recipe.random_seed, "seed", recipe.expert_names, recipe.model)


def warnings(recipe: Recipe) -> Iterator[str]:
    """Warnings: nothing that stops the run."""
    from megatron_btx.train import tracking

    yield from run_plan.warnings(recipe)
    apex = importlib.util.find_spec("apex") is not None
    if apex and importlib.util.find_spec("amp_C") is None:
        yield (
            "the installed package 'apex' is not NVIDIA's Apex, which is built from source; "
            "it is not used"
        )
    if recipe.wandb.mode != "disabled" and importlib.util.find_spec("wandb") is None:
        yield "wandb is not installed: metrics are written to metrics.jsonl only"
    elif recipe.wandb.mode == "online" and not tracking.has_key():
        yield tracking.NO_KEY


def crowded(stages: tuple[Stage, ...], cores: int) -> Iterator[str]:
    """A warning of the stages whose ranks and threads are more than this machine's cores: where
    they run without GPUs."""
    many = [stage for stage in stages if stage.cores > cores]
    if many:
        named = ", ".join(f"{one.name} ({one.world_size} x {one.num_threads})" for one in many)
        yield (
            f"{named}: more ranks x threads than the {cores} core{'s'[: cores - 1]} of this "
            "machine: they take turns and wait for each other, so that a step takes longer than "
            "with a rank for each core, and each rank needs its own memory; give smaller layouts"
        )


def _machine(recipe: Recipe, stage: Stage, gpus: int) -> None:
    """That this machine can run the stage's layout: better now than after days of other stages."""
    blocks = {"evaluate": recipe.evaluate.layout}
    blocks |= {
        stage_of_key(key): block.layout for key, block in recipe_check.stages(recipe).items()
    }
    if stage.kind == "import" or stage.name not in blocks:
        return
    key, layout = recipe_key(stage.name) + ".layout", blocks[stage.name]
    if not gpus:
        recipe_check.refuse_on_gloo(layout, key)
        if stage.world_size > run_stages.most_ranks():
            raise UserError(
                key,
                f"TP x PP x CP x DP is {stage.world_size} ranks, and this machine has "
                f"{run_stages.cores()} core(s)",
                f"give a layout of {run_stages.most_ranks()} ranks or fewer, or run the stage on "
                "several machines (`btx submit`, `btx stage`)",
            )
    elif stage.world_size > gpus:
        raise UserError(
            key,
            f"TP x PP x CP x DP is {stage.world_size} ranks of a GPU each; this machine has {gpus}",
            "lower it, or run the stage on several machines with `btx stage`",
        )


def _sources(run_dir: Path, left: tuple[Stage, ...]) -> None:
    """That finished stages still have the checkpoints that the stages left start from."""
    coming, looked = {stage.name for stage in left}, set[str]()
    errors: list[UserError] = []
    for stage in left:
        for need in stage.needs if stage.kind != "report" else ():
            trained = need.partition(":")[0] in graph.TRAINED
            if trained and need not in coming and need not in looked:
                looked.add(need)
                with collect_errors(errors):
                    find_checkpoint(stage_directory(run_dir, need))
    if errors:
        raise UserErrors(errors)


def keeps_recipe(run_dir: Path, given: Path, recipe: Recipe) -> None:
    """That the copy of the recipe in the run's directory takes no other file's place.

    Args:
        run_dir: where the copy would be written.
        given: the recipe's own file.
        recipe: what is in it.

    Raises:
        UserError: a ``recipe.yaml`` is there that no run has written, or it is the recipe itself.
    """
    copy = run_dir / KEPT
    if not copy.exists():
        return
    itself = copy.resolve() == given.resolve()
    if is_run(run_dir) and not (itself and not _was_kept(copy, recipe)):
        return
    raise UserError(
        str(copy),
        "is the recipe itself" if itself else "exists and was not written by a run",
        "a run writes the resolved recipe under this name: give another `run_dir:`",
    )


def _was_kept(copy: Path, recipe: Recipe) -> bool:
    """Whether a run has written this recipe, wherever that was."""
    text = copy.read_text(encoding="utf-8")
    there = read_tree(copy).value.get("run_dir")
    run_dir = Path(str(there.value)) if there is not None else copy.parent.absolute()
    earlier = dump(dataclasses.replace(recipe, run_dir=str(run_dir)))
    return text in (dump_kept(recipe, run_dir), earlier)  # of a release that kept `share` as it was


def _space(recipe: Recipe, run_dir: Path, left: tuple[Stage, ...]) -> None:
    """That the checkpoints of what is left fit the disk, all the way to its end."""
    names = {stage.name for stage in left}
    needed = run_plan.peak_disk(
        stage for stage in run_plan.plan(recipe).stages if stage.name in names
    )
    for stage in left:
        for file in (run_dir / stage.directory / "checkpoints").glob("step_????????/*"):
            needed -= file.stat().st_size
    there = run_dir.absolute()
    while not there.exists():
        there = there.parent
    total, _, free = shutil.disk_usage(there)  # a total of 0: of files that are no disk's
    if needed > free and total:
        raise UserError(
            str(run_dir),
            f"its checkpoints need {human(needed, 'B')}, {human(free, 'B')} are free: "
            "no space left for the rest",
            "free some, give another `run_dir:`, or lower `keep_checkpoints`",
        )


def _files(recipe: Recipe) -> int:
    """About how many files of text there are."""
    paths = [Path(p) for domain in recipe.domains.values() for p in domain.train + domain.valid]
    return sum(len(list(path.rglob("*"))) if path.is_dir() else 1 for path in paths)
