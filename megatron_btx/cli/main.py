"""The command line, ``btx``. Imports no torch, and each command only what it needs, so that ``btx
run`` of a finished run returns at once; and nothing of ours before Ctrl-C is looked after."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import importlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

from megatron_btx import __version__
from megatron_btx.errors import EXIT_INTERRUPTED, STOPS, RanksCrashed, UserError, coloured, shown

EXIT_CRASH, EXIT_USER, EXIT_PIPE = 1, 2, 141

_EPILOG = """examples:
  btx init --example demo                      write an example (without a checkout)
  btx plan examples/demo/recipe.yaml           what it will train, and what that costs
  btx run examples/demo/recipe.yaml            run it; after an interruption, continue
  btx report examples/demo/recipe.yaml         the final table; rewrite the page

exit codes: 0 done, 1 a crash, 2 a mistake in the input, 130 interrupted (run again to continue)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    with interruptible(once=arguments is None):
        _open_streams()
        return _run(sys.argv[1:] if arguments is None else list(arguments))


def _run(words: list[str]) -> int:
    try:
        _check_command(words)
        _check_here(words)
        options, unknown = _parser(*words[:1]).parse_known_args(words)
        if unknown:
            raise _unknown(options.parser, unknown)
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except UserError as error:
        sys.stderr.write(f"{coloured('error')}: {error}\n")
        return EXIT_USER
    except RanksCrashed:
        return EXIT_CRASH
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        # ... | head, or a terminal that has been closed
        if error.errno == errno.EPIPE or (error.errno == errno.EIO and error.filename is None):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_PIPE
        from megatron_btx.pipeline import failure

        problem = failure.of_system(error)
        if problem is None:
            raise
        sys.stderr.write(f"{coloured('error')}: {problem}\n")
        return EXIT_USER


def _check_command(words: list[str]) -> None:
    """That the first word, where it is no flag, is a command."""
    names = [name for each in _COMMANDS.values() for name in each]
    if words and not words[0].startswith("-") and words[0] not in names:
        near = difflib.get_close_matches(words[0], names, n=1)
        hint = f"did you mean `btx {near[0]}`? " if near else ""
        raise UserError(shown(words[0]), "is not a command of btx", f"{hint}see btx --help")


def _check_here(words: list[str]) -> None:
    """That the current directory is there. Without one libraries end the process in their own
    words, and no relative path means anything."""
    if {"-h", "--help", "--version"} & set(words):
        return
    try:
        os.getcwd()
    except FileNotFoundError:
        what = "no longer exists: it was removed after the shell had gone there"
        raise UserError("the current directory", what, "cd to another one") from None


def _unknown(parser: argparse.ArgumentParser, words: Sequence[str]) -> UserError:
    """For what a command does not take: a flag, or a word too many."""
    name = parser.prog
    first = words[0].partition("=")[0]
    if not first.startswith("-") or first == "-":
        fix = f"repeat its flag before each value, or see {name} --help"
        return UserError(first, f"is a word too many for {name}", fix)
    flags = re.findall(r"--[\w-]+", parser.format_usage())
    word = first.replace("-", "")
    close = [flag for flag in flags if len(word) > 1 and word in flag.replace("-", "")]
    close += difflib.get_close_matches(first, flags, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return UserError(first, f"is not a flag of {name}", f"{hint}see {name} --help")


@contextlib.contextmanager
def interruptible(*, once: bool) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal end the command in order (``KeyboardInterrupt``): what
    it has started ends, and what is unfinished under a temporary name goes. While that happens a
    second signal is ignored; a third ends the process at once.

    So does the first in an import: libraries take any exception there for a module that is
    missing, and go on.

    Args:
        once: the process ends behind the block: what comes then ends it at once, without a word.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    count = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 2 or (once and _imports(frame)):
            os._exit(EXIT_INTERRUPTED)
        if count == 1:
            raise KeyboardInterrupt

    former = {number: signal.getsignal(number) for number in STOPS}
    caught = [n for n in STOPS if former[n] in (signal.SIG_DFL, signal.default_int_handler)]
    try:
        for number in caught:
            signal.signal(number, stop)
        yield
    except KeyboardInterrupt:  # on the way in or out
        if not once:
            raise
        sys.exit(EXIT_INTERRUPTED)
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL if once else former[number])


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported in it, or in what called it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


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


class _Parser(argparse.ArgumentParser):
    """Its errors are like all others."""

    def error(self, message: str) -> NoReturn:
        """Of a flag's value, a missing word, ...; without the usage's many lines."""
        found = re.fullmatch(r"argument ([^:]+): (.+)", message, re.DOTALL)
        where, what = found.groups() if found else (self.prog, message)
        raise UserError(where, what, f"see {self.prog} --help")


def _parser(command: str = "") -> argparse.ArgumentParser:
    """The parser of ``command``, whose module alone is imported; of all where it is not one."""
    parser = _Parser(
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
