"""``btx keys``: what may stand in a recipe. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from megatron_btx.cli.common import command
from megatron_btx.errors import UserError
from megatron_btx.files import json_text
from megatron_btx.recipe import key_reference
from megatron_btx.recipe.messages import ELSEWHERE, near_key

_EPILOG = """examples:
  btx keys                     every key
  btx keys model               the keys of a block
  btx keys finetune.layout     the keys of a stage's layout
  btx keys lr --json           a key in all blocks, as JSON"""


def add_parser(commands: Any) -> None:
    """Add ``keys`` to the command line."""
    parser = command(
        commands, "keys", "list the keys of a recipe: type, default, range, meaning", _EPILOG
    )
    parser.add_argument("prefix", nargs="?", default="", metavar="PREFIX", help="a block or a key")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the keys; exit code 0.

    Raises:
        UserError: there is no such key.
    """
    found = key_reference.matching(options.prefix)
    if not found:
        names = [key.name for key in key_reference.all_keys()]
        last = {name.rpartition(".")[2] for name in names}
        elsewhere = ELSEWHERE.get(options.prefix.lower().replace("-", "_"))
        near = f"; did you mean `{elsewhere}`?" if elsewhere in last else ""
        near = near or near_key(options.prefix, [*names, *last])
        raise UserError(options.prefix, "is no key of a recipe", f"see `btx keys`{near}")
    if options.json:
        sys.stdout.write(json_text([dataclasses.asdict(key) for key in found], indent=1) + "\n")
    else:
        sys.stdout.write(key_reference.as_text(found))
    return 0
