"""``btx export``: a finished model of a run as a Hugging Face directory. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
import uuid
from pathlib import Path
from typing import Any

from megatron_btx.cli.common import command, run_directory
from megatron_btx.errors import UserError, UserErrors
from megatron_btx.files import no_directory
from megatron_btx.pipeline import eval_ranks, graph, state
from megatron_btx.recipe import check_paths
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.read_architecture import from_manifest
from megatron_btx.recipe.schema import Layout, Recipe
from megatron_btx.recipe.stages import directory
from megatron_btx.recipe.systems import TableRow, row_of
from megatron_btx.report.model_card import run_card
from megatron_btx.weights.claimed_directory import claimed, unwritable
from megatron_btx.weights.directory import add_files

_EPILOG = """examples:
  btx export runs/demo --out demo-moe                      the system itself: the finetuned MoE
  btx export runs/demo --stage expert:math --out math      an expert; the seed; the dense baseline
  btx export runs/btm_average --out averaged               the average of Branch-Train-Merge

The directory is whole in itself: weights, tokenizer, README.md (a card as the Hugging Face Hub
reads it) and verification.json. Every tensor is read back bit for bit, and logits and held-out
losses are compared with transformers' where it is installed; if they differ, nothing is written."""


def add_parser(commands: Any) -> None:
    """Add ``export`` to the command line."""
    parser = command(
        commands, "export", "a finished model of a run for Hugging Face, with its card", _EPILOG
    )
    parser.add_argument(
        "run_dir", metavar="RUN", type=run_directory, help="the run's directory, or its recipe"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the new directory")
    parser.add_argument(
        "--stage", default="", metavar="NAME", help="seed, expert:NAME, dense, btm or btx"
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with transformers",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """``btx export``.

    Raises:
        UserErrors: it is no run, the model is not finished, or no family computes it.
    """
    run_dir, out = options.run_dir, options.out
    if not (run_dir / "recipe.yaml").is_file():
        what = "is no run: it holds no recipe.yaml"
        raise UserError(str(run_dir), what, "give the directory that btx run made")
    if os.path.lexists(out):
        raise UserError(str(out), "exists already", "remove it, or give another name")
    if not out.absolute().parent.is_dir():
        raise no_directory(out.parent)
    recipe = load_recipe(run_dir / "recipe.yaml")
    _check_finished(recipe, run_dir, row_of(recipe, options.stage))  # before anything starts
    found = _exported(options)
    sys.stdout.writelines(f"llama.cpp: {line}\n" for line in found["llama_cpp"])
    sys.stdout.write(f"{out}: {len(found['claims'])} claims hold, see verification.json\n")
    return 0


def _check_finished(recipe: Recipe, run_dir: Path, row: TableRow) -> None:
    """That the stages of a row are done: what the card says of them is what the recipe says.

    Raises:
        UserErrors: those that are not, or were done for another recipe.
    """
    standing = state.statuses(run_dir, graph.of_run(recipe, run_dir))
    errors = []
    for name in row.models:
        word, why = standing[name]
        finished = (directory(run_dir, name) / "done.json").exists()
        # Its key is of what is read by content too, which a run that was moved may be without.
        if word == "done" or (finished and check_paths.bad_paths(recipe)):
            continue
        fix = f"finish it first: btx run {run_dir}"
        if finished:
            fix = "put back what has changed; or `btx run` makes it anew"
        errors.append(UserError(name, f"is {word}: {why}" if why else f"is {word}", fix))
    if errors:
        raise UserErrors(errors)


def _exported(options: argparse.Namespace) -> dict[str, Any]:
    """Make the directory; what the ranks have found."""
    # Nothing of an export that was killed is used: each has an identity of its own.
    with claimed(options.out, f"export {uuid.uuid4()}") as partial:
        place = partial.path.absolute() / "export"
        try:
            asked = eval_ranks.request_of(
                "export",
                [],
                Layout(),
                run_dir=str(options.run_dir.absolute()),
                stage=options.stage,
                out=str(place),
                check=options.check,
            )
            found: dict[str, Any] = eval_ranks.answer(asked)
            made = _card(options.run_dir, options.stage, place, found)
            with unwritable(options.out):
                add_files(place, made)
                partial.finish(place.name)
        finally:
            partial.discard()
    return found


def _card(run_dir: Path, stage: str, place: Path, found: dict[str, Any]) -> dict[str, bytes]:
    """Card, verification and pictures, by their names."""
    recipe = load_recipe(run_dir / "recipe.yaml")
    architecture = from_manifest(found["architecture"], place)
    row, claims, told = row_of(recipe, stage), found["claims"], found["llama_cpp"]
    card, pictures = run_card(recipe, run_dir, row, architecture, claims, told)
    return {**card.files(), **pictures}
