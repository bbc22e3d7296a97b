"""``btx init``: an example to begin with. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_btx.cli.common import command
from megatron_btx.errors import UserError
from megatron_btx.recipe import examples

_EPILOG = """examples:
  btx init --example demo                 examples/demo/recipe.yaml, in the current directory
  btx init --example systems own_loop     with the recipes that they start from
  btx init --list                         the examples that there are"""


def add_parser(commands: Any) -> None:
    """Add ``init`` to the command line."""
    parser = command(commands, "init", "write a recipe to begin with", _EPILOG)
    parser.add_argument("--example", metavar="NAME", nargs="+", default=[], help="write these out")
    parser.add_argument("--list", action="store_true", help="list the examples")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("examples"), help="where (examples)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """``btx init``.

    Raises:
        UserError: nothing is asked for, or it cannot be written.
    """
    if options.list:
        sys.stdout.write("\n".join(examples.names()) + "\n")
        return 0
    if not options.example:
        if sys.stdout.isatty():
            sys.stdout.write(f"{_EPILOG}\n")
            return 0
        raise UserError("btx init", "nothing to write", "give --example NAME, or see --list")
    written = examples.write_out(options.example, options.out)
    for path in written:
        sys.stdout.write(f"{path}\n")
    recipes = [path for path in written if path.name == "recipe.yaml"]
    if recipes:
        sys.stdout.write(f"\nnext: btx plan {recipes[-1]}\n")
    return 0
