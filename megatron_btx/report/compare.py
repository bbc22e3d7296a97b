"""``btx compare``: run what is missing of several recipes, and set them side by side."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.files import written
from megatron_btx.pipeline import graph, state
from megatron_btx.pipeline.fingerprint import Memo
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.systems import SYSTEMS
from megatron_btx.recipe.tree import read_tree
from megatron_btx.report import comparison, comparison_page
from megatron_btx.report.comparison import Run

_EPILOG = """examples:
  btx compare examples/systems                        every system of the paper, on the demo's text
  btx compare examples/systems --base my/base.yaml    the same systems of another base
  btx compare dense.yaml btx.yaml --seeds 3           mean and spread over three random seeds
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
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the comparison goes")
    parser.add_argument("--dry-run", action="store_true", help="print what is left, do nothing")
    parser.add_argument("--json", action="store_true", help="print compare.json, no table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The command; its exit code."""
    if options.seeds < 1:
        raise UserError("--seeds", f"is {options.seeds}", "give at least 1")
    runs = _runs(_files(options.recipes), options.base, options.seeds)
    if options.dry_run:
        _print_left(runs)
        return 0
    out = options.out or Path(os.path.commonpath([str(one.run_dir) for one in runs]))
    for number, one in enumerate(runs, 1):
        code = _run_one(one, runs, f"{number}/{len(runs)}")
        if code != 0:
            return code
    made = comparison.compare(runs)
    text = comparison.as_json(made)
    _write(out / "compare.json", text)
    _write(out / "compare.md", comparison.markdown(made))
    _write(out / "compare.html", comparison_page.render(made, out.name or "systems"))
    if options.json:
        sys.stdout.write(text)
    else:
        sys.stdout.write(comparison.plain(made))
        sys.stdout.write(f"page: {out / 'compare.html'}\n")
    return 0


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
