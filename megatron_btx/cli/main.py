"""The command line, ``btx``. Imports no torch, and each command only what it needs, so that ``btx
run`` of a finished run returns at once."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence

from megatron_btx import __version__
from megatron_btx.cli import (
    centroids,
    compare,
    convert,
    data,
    doctor,
    evaluate,
    export,
    generate,
    init,
    keys,
    mix,
    plan,
    report,
    routing,
    run,
    slurm,
    stage,
)
from megatron_btx.cli.common import coloured
from megatron_btx.errors import UserError
from megatron_btx.pipeline import failure
from megatron_btx.pipeline.local.runner import EXIT_INTERRUPTED

EXIT_USER, EXIT_PIPE = 2, 141

_EPILOG = """examples:
  btx init --example demo                      write an example out, where there is no checkout
  btx plan examples/demo/recipe.yaml           what it will train, and what that costs
  btx run examples/demo/recipe.yaml            do it; after an interruption, go on
  btx report examples/demo/recipe.yaml         the final table, and the page anew

exit codes: 0 done, 1 a crash, 2 a mistake in the input, 130 interrupted (run again to go on)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    _open_streams()
    options = _parser().parse_args(arguments)
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


_COMMANDS = (
    *(init, doctor, run, plan, keys, report, stage, mix, convert, export, compare),
    *(evaluate, generate, routing, centroids, data, slurm),
)
"""Each adds its parsers, in the order of ``btx --help``."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="btx",
        description="Branch-Train-MiX on Megatron-Core: from one recipe to a mixture of experts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-btx {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in _COMMANDS:
        module.add_parser(commands)
    return parser
