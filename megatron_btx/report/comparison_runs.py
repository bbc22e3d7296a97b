"""The runs of a comparison: recipes under several random seeds, run one after the other, sharing
what they have in common. Imports no torch."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.evaluate import model_spec
from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.files import find_json, seen_from_here, write_json
from megatron_btx.pipeline import eval_ranks, graph, run_checks, state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.keys import Memo
from megatron_btx.recipe.load import WHERE_IT_RUNS, digest, load_recipe
from megatron_btx.recipe.schema import Layout, Recipe
from megatron_btx.recipe.stages import directory
from megatron_btx.recipe.systems import SYSTEMS, TableRow, rows
from megatron_btx.report import comparison
from megatron_btx.report.comparison import FinishedRun
from megatron_btx.weights.find_checkpoint import find_checkpoint


def runs_of(files: Sequence[Path], base: str | None, seeds: int) -> list[FinishedRun]:
    """Every recipe under every random seed, in the order of the paper's table 2: what systems
    share is so trained by the simplest of them.

    Raises:
        UserError: two would run in one directory or be one row of the tables; their domains are
            not the same; or under another random seed the held-out text would be another.
    """
    recipes = [load_recipe(file, base) for file in files]
    _check_names(files, recipes)
    for file, recipe in zip(files, recipes, strict=True):
        if list(recipe.domains) != list(recipes[0].domains):
            here, there = ", ".join(recipe.domains), ", ".join(recipes[0].domains)
            what = f"are {here}, those of {files[0]} {there}"
            raise UserError(f"{file}: domains", what, "compare recipes with the same domains")
    if seeds > 1:
        for recipe in recipes:
            _same_text(recipe)
    recipes.sort(key=lambda recipe: list(SYSTEMS).index(recipe.system))
    runs: list[FinishedRun] = []
    for more in range(seeds):
        for recipe in recipes:
            seed = recipe.random_seed + more
            run_dir = recipe.run_dir if more == 0 else f"{recipe.run_dir}-{seed}"
            one = dataclasses.replace(recipe, random_seed=seed, run_dir=run_dir)
            runs.append(FinishedRun(recipe=one, run_dir=Path(run_dir)))
    places = [made.run_dir for made in runs]
    for place in places:
        if places.count(place) > 1:
            what = f"two recipes of the comparison run in {place}"
            raise UserError("run_dir", what, "give each a `name:` of its own")
    return runs


def _check_names(files: Sequence[Path], recipes: Sequence[Recipe]) -> None:
    """That a row of the tables, which has a recipe's name, is one system: the same recipe under
    other random seeds, and no ``btx`` of the name ``dense``."""
    first: dict[str, tuple[Path, Recipe]] = {}
    for file, recipe in zip(files, recipes, strict=True):
        fix = "give it a `name:` of its own"
        if recipe.name in _ROWS and recipe.system != recipe.name:
            what = f"{recipe.name} is the name of another system's row, and this is {recipe.system}"
            raise UserError(f"{file}: name", what, fix)
        other, known = first.setdefault(recipe.name, (file, recipe))
        if known is recipe:
            continue
        if file.resolve() == other.resolve():
            raise UserError(str(file), "is named twice", "name each recipe once")
        elsewhere = {key: getattr(recipe, key) for key in (*WHERE_IT_RUNS, "random_seed")}
        like = dataclasses.replace(known, **elsewhere)
        if like != recipe or known.random_seed == recipe.random_seed:
            raise UserError(f"{file}: name", f"is {recipe.name}, as that of {other}", fix)


_ROWS = ("seed", "dense")
"""Of models that many systems have beside their own."""


def _same_text(recipe: Recipe) -> None:
    for name, domain in recipe.domains.items():
        if domain.builtin is not None:
            what = (
                f"{recipe.name}: domains.{name} is `builtin: {domain.builtin}`, whose text is made "
                "anew for each random seed: the losses would be of other text"
            )
            raise UserError("--seeds", what, "give it files (`train:`), here or in `--base`")


def groups_of(
    files: Sequence[Path], bases: Sequence[str], seeds: int
) -> dict[str, list[FinishedRun]]:
    """The runs under each base, by its file's name; without one under the recipes' own."""
    found: dict[str, list[FinishedRun]] = {}
    owner: dict[Path, str] = {}
    every: Sequence[str | None] = bases or [None]
    for base in every:
        name = "" if base is None else Path(base).stem
        if name in found:
            raise UserError(f"--base {base}", f"there are two of the name {name}", "rename one")
        found[name] = runs_of(files, base, seeds)
        for run in found[name]:
            if owner.setdefault(run.run_dir, name) != name:
                what = f"{name} and {owner[run.run_dir]} both run in {run.run_dir}"
                raise UserError("run_dir", what, "give each base a `run_dir:` of its own")
    return found


def run_one(one: FinishedRun, runs: Sequence[FinishedRun], place: str) -> int:
    """Run what is left of one; the exit code. ``place`` is told: ``2/6``."""
    from megatron_btx.pipeline.local.run_recipe import run_recipe
    from megatron_btx.report import page

    stages = graph.of_run(one.recipe, one.run_dir)
    if not state.left(one.run_dir, stages):
        return 0
    sys.stderr.write(f"{one.recipe.name} ({place}), in {one.run_dir}\n")
    share = [str(other.run_dir) for other in runs]
    outcome = run_recipe(
        one.recipe, one.run_dir, stages, page=page.write, refresh=page.REFRESH, share=share
    )
    if outcome.problem:
        sys.stderr.write(f"error: {outcome.problem}\n")
    elif outcome.code:
        sys.stderr.write("stopped; give the same command again to continue\n")
    return outcome.code


def print_left(runs: Sequence[FinishedRun]) -> None:
    """What each run has, what it will take from another, and what is left.

    Raises:
        UserErrors: files that they need are missing.
    """
    wanted: dict[tuple[str, str], str] = {}
    unfinished: list[tuple[Recipe, Path, tuple[Stage, ...]]] = []
    share = [str(one.run_dir) for one in runs]
    several = len({one.recipe.random_seed for one in runs}) > 1
    names = [
        f"{one.recipe.name}-{one.recipe.random_seed}" if several else one.recipe.name
        for one in runs
    ]
    width = max(map(len, names))
    for one, name in zip(runs, names, strict=True):
        words, stages = [], graph.of_run(one.recipe, one.run_dir)
        unfinished.append((one.recipe, one.run_dir, state.left(one.run_dir, stages)))
        statuses = state.statuses(one.run_dir, stages, (*one.recipe.share, *share))
        for stage in stages:
            standing, why = statuses[stage.name]
            owner = wanted.setdefault((stage.name, stage.key), name)
            if standing != "done" and owner != name and state.may_take(one.run_dir, stage):
                standing, why = "shared", f"from {owner}"
            words.append(f"{stage.name} {why if standing == 'shared' else standing}")
        sys.stdout.write(f"{name:<{width}}  {', '.join(words)}\n")
    for place in dict.fromkeys(seen_from_here(one.run_dir.parent) for one in runs):
        sys.stdout.write(f"runs go to {place}\n")
    run_checks.check_inputs(*unfinished)


def measure_tasks(
    runs: Sequence[FinishedRun], tasks: list[dict[str, Any]], kept: Path
) -> dict[str, dict[str, Any]]:
    """Scores on tasks of every system, under the first random seed: by name what ``btx evaluate
    --tasks`` says of it. What has been measured lies in ``kept``, by what it is of. An average of
    weights (``btm: {method: average}``) is no checkpoint, and left out.
    """
    found: dict[str, dict[str, Any]] = {}
    seed = runs[0].recipe.random_seed
    memo = Memo()
    for run, named in zip(runs, comparison.titles(runs), strict=True) if tasks else ():
        for row in rows(run.recipe):
            name = named[row.name]
            ensemble = len(row.models) > 1
            averaged = ensemble and run.recipe.btm.method == "average"
            if name in found or averaged or run.recipe.random_seed != seed:
                continue
            files = [memo.paths([*task["files"], *task["shots"]]) for task in tasks]
            models = [find_json(directory(run.run_dir, m) / "stage.json") for m in row.models]
            method = run.recipe.btm if ensemble else None
            path = kept / f"{digest([tasks, files, models, method])[:16]}.json"
            score = find_json(path)
            if score is None:
                sys.stderr.write(f"{name}: tasks\n")
                score = _score(run, row, tasks)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, score)
            found[name] = score
    return found


def _score(run: FinishedRun, row: TableRow, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    if len(row.models) > 1:
        (one,) = model_spec.parse([f"btm:{run.run_dir}"])
    else:
        place = find_checkpoint(directory(run.run_dir, row.models[0]))
        one = Subject(name="model", models={"model": place})
    layout = Layout(num_threads=eval_ranks.threads(1))
    predictor = {"precision": None, "micro_batch_size": 8, "tokenizer": None}
    asked = eval_ranks.request_of("tasks", [one], layout, tasks=tasks, predictor=predictor)
    answer: dict[str, Any] = eval_ranks.answer(asked)[one.name]
    return answer
