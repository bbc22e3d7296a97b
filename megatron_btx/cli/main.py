"""The command line, ``btx``. Imports no torch, and each command only what it needs, so that ``btx
run`` of a finished run returns at once."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence

from megatron_btx import __version__
from megatron_btx.cli.common import coloured
from megatron_btx.errors import UserError
from megatron_btx.pipeline import failure
from megatron_btx.pipeline.local.run_stages import EXIT_INTERRUPTED

EXIT_USER, EXIT_PIPE = 2, 141

_EPILOG = """examples:
  btx init --example demo                      write an example (without a checkout)
  btx plan examples/demo/recipe.yaml           what it will train, and what that costs
  btx run examples/demo/recipe.yaml            run it; after an interruption, continue
  btx report examples/demo/recipe.yaml         the final table; rewrite the page

exit codes: 0 done, 1 a crash, 2 a mistake in the input, 130 interrupted (run again to continue)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    _open_streams()
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser(*words[:1]).parse_args(words)
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except UserError as error:
        sys.stderr.write(f"{coloured('error')}: {error}\n")
        return EXIT_USER
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        # ... | head, or a terminal that has been closed
        if error.errno == errno.EPIPE or (error.errno == errno.EIO and error.filename is None):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_PIPE
        problem = failure.of_system(error)
        if problem is None:
            raise
        sys.stderr.write(f"{coloured('error')}: {problem}\n")
        return EXIT_USER


def _open_streams() -> None:
    """Standard streams that can be written to. Where one was closed, the next file that is opened
    would get its number, and with it whatever a library says. What an output's encoding has not is
    said some way, as on the standard error."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


_COMMANDS = {
    "init": ("init",),
    "doctor": ("doctor",),
    "run": ("run",),
    "plan": ("plan",),
    "keys": ("keys",),
    "report": ("report",),
    "stage": ("stage",),
    "mix": ("mix", "drift", "verify"),
    "convert": ("convert",),
    "export": ("export",),
    "compare": ("compare",),
    "evaluate": ("evaluate",),
    "generate": ("generate",),
    "routing": ("routing",),
    "centroids": ("centroids",),
    "data": ("data",),
    "slurm": ("submit", "status", "logs", "cancel"),
}
"""Modules of ``cli/`` and the commands whose parsers each adds, in the order of ``btx --help``."""


def _parser(command: str = "") -> argparse.ArgumentParser:
    """The parser of ``command``, whose module alone is imported; of all where it is not one."""
    parser = argparse.ArgumentParser(
        prog="btx",
        description="Branch-Train-MiX on Megatron-Core: from one recipe to a mixture of experts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-btx {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    named = [module for module, names in _COMMANDS.items() if command in names]
    for module in named or _COMMANDS:
        importlib.import_module(f"megatron_btx.cli.{module}").add_parser(commands)
    return parser
