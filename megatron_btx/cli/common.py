"""What the commands share: how a parser is made, and a recipe opened. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.pipeline import graph
from megatron_btx.pipeline.graph import Stage
from megatron_btx.recipe.load import KEPT, is_run, load_recipe
from megatron_btx.recipe.schema import Recipe
from megatron_btx.recipe.yaml_tree import read_tree


def recipe_files(given: Sequence[Path]) -> list[Path]:
    """The recipes; of a folder those in it that are no other's base."""
    found: list[Path] = []
    for path in given:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(path.glob("*.yaml"))
        trees = {file: read_tree(file).value.get("base") for file in inside}
        bases = {
            (file.parent / os.path.expanduser(base.value)).resolve()
            for file, base in trees.items()
            if base is not None and isinstance(base.value, str)
        }
        recipes = [file for file in inside if file.resolve() not in bases]
        if not recipes:
            fix = "give a recipe, or a folder of them"
            if (path.parent / KEPT).is_file() and is_run(path.parent):  # a stage's directory
                fix = f"give the run: {path.parent}"
            raise UserError(str(path), "has no recipe in it", fix)
        found += recipes
    return found


def recipe_file(path: str) -> str:
    """The recipe that is meant: the file itself, or the one in a folder, such as a run's directory.

    Raises:
        UserError: the folder has none, or several.
    """
    files = recipe_files([Path(path)])
    if len(files) > 1:
        what = f"has {len(files)} recipes in it"
        raise UserError(path, what, f"give one of them, such as {files[0]}")
    return str(files[0])


def run_directory(path: str) -> Path:
    """The run that is meant: its directory, given itself or by its recipe."""
    return Path(load_recipe(path).run_dir) if Path(path).is_file() else Path(path)


def command(
    commands: Any, name: str, what: str, epilog: str, description: str = ""
) -> argparse.ArgumentParser:
    """A command's parser.

    Args:
        commands: what ``add_subparsers`` returned.
        name: ``run``, ``mix``, ...
        what: one line for ``btx --help``, without a capital or a full stop.
        epilog: examples and what else ``--help`` shows at its end, printed as written.
        description: the line at the beginning of ``--help``; by default ``what`` as a sentence.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=description or f"{what[0].upper()}{what[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(parser=parser)
    return parser


def recipe_command(commands: Any, name: str, what: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of a command whose first argument is a recipe, or a run's directory."""
    parser = command(commands, name, what, epilog)
    parser.add_argument(
        "recipe", metavar="RECIPE", type=recipe_file, help="the recipe (YAML), or a run's directory"
    )
    return parser


def add_format_flag(parser: argparse.ArgumentParser, what: str) -> None:
    """``--format``, which may be repeated."""
    parser.add_argument(
        "--format",
        choices=["svg", "png", "csv"],
        action="append",
        default=[],
        help=f"write {what} for a paper (may be repeated): a figure, or its numbers",
    )


def renamed(parser: argparse.ArgumentParser, old: str, new: str) -> None:
    """Let flag ``old`` stand for ``new`` in this release, with a hint on the standard error.

    ``new`` has been added before; ``old`` takes what it takes.
    """
    (target,) = (action for action in parser._actions if new in action.option_strings)

    class Renamed(argparse.Action):
        """Stores as ``new`` does."""

        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: str | Sequence[Any] | None,
            option_string: str | None = None,
        ) -> None:
            sys.stderr.write(f"hint: {old} is now called {new}; the old name will be removed\n")
            target(parser, namespace, values, option_string)

    kind: dict[str, Any] = {} if target.type is None else {"type": target.type}
    parser.add_argument(
        old,
        action=Renamed,
        dest=target.dest,
        nargs=target.nargs,
        default=target.default,
        help=argparse.SUPPRESS,
        **kind,
    )


def open_recipe(path: str) -> tuple[Recipe, Path, tuple[Stage, ...]]:
    """A recipe, its run's directory and its stages."""
    recipe = load_recipe(path)
    run_dir = Path(recipe.run_dir)
    return recipe, run_dir, graph.of_run(recipe, run_dir)
