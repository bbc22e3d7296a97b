"""``btx compare``: run what is missing of several recipes, and set them side by side."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_btx.cli import evaluate
from megatron_btx.errors import UserError
from megatron_btx.evaluate import model_spec
from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.files import check_directory, find_json, write_json, written
from megatron_btx.pipeline import eval_ranks, graph, state
from megatron_btx.pipeline.fingerprint import Memo
from megatron_btx.recipe.load import digest, load_recipe
from megatron_btx.recipe.schema import Layout
from megatron_btx.recipe.stages import directory
from megatron_btx.recipe.systems import SYSTEMS, Row, rows
from megatron_btx.recipe.yaml_tree import read_tree
from megatron_btx.report import comparison, comparison_page
from megatron_btx.report.comparison import Run

_EPILOG = """examples:
  btx compare examples/systems                        every system of the paper, on the demo's text
  btx compare examples/systems --base my/base.yaml    the same systems of another base
  btx compare dense.yaml btx.yaml --seeds 3           mean and spread over three random seeds
  btx compare examples/systems --tasks arc_easy=test.jsonl --limit 200    and their scores on tasks
  btx compare examples/systems --dry-run              what is done, shared and left

What several recipes have in common (the seed, an expert) is trained once. Run it again after an
interruption: it goes on. The table goes to the terminal, and as compare.md, compare.json and
compare.html to --out."""


def add_parser(commands: Any) -> None:
    """Add ``compare`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="run several systems and compare them at matched data and compute",
        description="Run what is missing of several recipes, and set them side by side.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recipes", metavar="RECIPE", nargs="+", type=Path, help="recipes, or folders of them"
    )
    parser.add_argument("--base", metavar="RECIPE", help="stands in for the `base:` of each")
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help="random seeds (1)")
    evaluate.add_tasks(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the comparison goes")
    parser.add_argument("--dry-run", action="store_true", help="print what is left, do nothing")
    parser.add_argument("--json", action="store_true", help="print compare.json, no table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The command; its exit code."""
    if options.seeds < 1:
        raise UserError("--seeds", f"is {options.seeds}", "give at least 1")
    evaluate.check_numbers(options)
    runs = _runs(_files(options.recipes), options.base, options.seeds)
    out = options.out or _common([one.run_dir for one in runs])
    check_directory(out)
    asked = evaluate.tasks_of(options)  # before hours of training: a file may not be there
    if options.dry_run:
        _print_left(runs)
        return 0
    for number, one in enumerate(runs, 1):
        code = _run_one(one, runs, f"{number}/{len(runs)}")
        if code != 0:
            return code
    made = comparison.compare(runs)
    try:
        tasks = measure_tasks(runs, asked, out / "tasks")
    except eval_ranks.Ended as ended:
        return ended.code
    text = comparison.as_json(made, tasks)
    table = evaluate.tasks_table(tasks) if tasks else ""
    _write(out / "compare.json", text)
    _write(out / "compare.md", comparison.markdown(made) + (table and f"\n```\n{table}```\n"))
    _write(out / "compare.html", comparison_page.render(made, out.name or "systems", table))
    if options.json:
        sys.stdout.write(text)
    else:
        sys.stdout.write(comparison.plain(made) + (table and f"\n{table}"))
        sys.stdout.write(f"page: {out / 'compare.html'}\n")
    return 0


def _common(directories: Sequence[Path]) -> Path:
    """The directory that holds all of them; as they are written, if that can be said."""
    if len({directory.is_absolute() for directory in directories}) > 1:
        directories = [directory.absolute() for directory in directories]
    return Path(os.path.commonpath(directories))


def measure_tasks(
    runs: Sequence[Run], tasks: list[dict[str, Any]], kept: Path
) -> dict[str, dict[str, Any]]:
    """Scores on tasks of every system, under the first random seed: by name what ``btx evaluate
    --tasks`` says of it. What has been measured lies in ``kept``, by what it is of. An average of
    weights (``btm: {select: average}``) is no checkpoint, and left out.
    """
    found: dict[str, dict[str, Any]] = {}
    seed = runs[0].recipe.random_seed
    memo = Memo()
    for run in runs if tasks else ():
        for row in rows(run.recipe):
            name = comparison.title(run.recipe, row.name)
            ensemble = len(row.models) > 1
            averaged = ensemble and run.recipe.btm.select == "average"
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


def _score(run: Run, row: Row, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    if len(row.models) > 1:
        (one,) = model_spec.parse([f"btm:{run.run_dir}"])
    else:
        place = model_spec.find(directory(run.run_dir, row.models[0]))
        one = Subject(name="model", models={"model": place})
    layout = Layout(num_threads=eval_ranks.threads(1))
    predictor = {"precision": None, "micro_batch_size": 8, "tokenizer": None}
    asked = eval_ranks.request_of("tasks", [one], layout, tasks=tasks, predictor=predictor)
    answer: dict[str, Any] = eval_ranks.answer(asked)[one.name]
    return answer


def _files(given: Sequence[Path]) -> list[Path]:
    """The recipes; of a folder those in it that are no other's base."""
    found: list[Path] = []
    for path in given:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(path.glob("*.yaml"))
        trees = {file: read_tree(file).value.get("base") for file in inside}
        bases = {
            (file.parent / base.value).resolve()
            for file, base in trees.items()
            if base is not None and isinstance(base.value, str)
        }
        recipes = [file for file in inside if file.resolve() not in bases]
        if not recipes:
            raise UserError(str(path), "has no recipe in it", "give a folder of *.yaml recipes")
        found += recipes
    return found


def _runs(files: Sequence[Path], base: str | None, seeds: int) -> list[Run]:
    """Every recipe under every random seed, in the order of the paper's table 2: what systems
    share is so trained by the simplest of them."""
    recipes = [load_recipe(file, base) for file in files]
    recipes.sort(key=lambda recipe: list(SYSTEMS).index(recipe.system))
    runs: list[Run] = []
    for more in range(seeds):
        for recipe in recipes:
            seed = recipe.random_seed + more
            run_dir = recipe.run_dir if more == 0 else f"{recipe.run_dir}-{seed}"
            one = dataclasses.replace(recipe, random_seed=seed, run_dir=run_dir)
            runs.append(Run(recipe=one, run_dir=Path(run_dir)))
    places = [made.run_dir for made in runs]
    for place in places:
        if places.count(place) > 1:
            what = f"two recipes of the comparison run in {place}"
            raise UserError("run_dir", what, "give each a `name:` of its own")
    return runs


def _run_one(one: Run, runs: Sequence[Run], place: str) -> int:
    from megatron_btx.report.run import run_left

    stages = graph.build(one.recipe, Memo(one.run_dir / "fingerprints.json"))
    if not state.left(one.run_dir, stages):
        return 0
    sys.stderr.write(f"{one.recipe.name} ({place}), in {one.run_dir}\n")
    share = [str(other.run_dir) for other in runs]
    outcome = run_left(one.recipe, one.run_dir, stages, share=share)
    if outcome.problem:
        sys.stderr.write(f"error: {outcome.problem}\n")
    elif outcome.code:
        sys.stderr.write("stopped; run again to go on\n")
    return outcome.code


def _print_left(runs: Sequence[Run]) -> None:
    """What each run has, what it will take from another, and what is left."""
    wanted: dict[str, str] = {}
    width = max(len(one.recipe.name) for one in runs)
    for one in runs:
        words = []
        for stage in graph.build(one.recipe, Memo(one.run_dir / "fingerprints.json")):
            if stage.kind in ("evaluate", "export", "report"):
                standing = "done" if state.done(one.run_dir, stage) else "left"
            elif state.done(one.run_dir, stage):
                standing = "done"
            else:
                owner = wanted.get(stage.key)
                standing = f"from {owner}" if owner else "left"
            wanted.setdefault(stage.key, one.recipe.name)
            words.append(f"{stage.name} {standing}")
        sys.stdout.write(f"{one.recipe.name:<{width}}  {', '.join(words)}\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as file:
        file.write(text)
