"""``btx mix``, ``btx drift`` and ``btx verify``. Imports no torch until one runs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_btx.cli.common import command
from megatron_btx.errors import UserError, UserErrors
from megatron_btx.mix.request import Request
from megatron_btx.provenance import code_revision

_EPILOG = """examples:
  btx mix --sources code=DIR math=DIR seed=DIR --out MIXTRAL
  btx mix --sources code=DIR math=DIR --out MOE --format megatron --dry-run
  btx mix --method upcycle --copies 8 --sources DIR --out MIXTRAL --memory 2GiB
  btx mix --config mix.yaml --out MIXTRAL         options in a file, by the names of the flags

A source is a Hugging Face directory (docs/convert.md) or a Megatron step directory of btx. Started
again after an interruption, it goes on from the finished files."""

_DRIFT = """examples:
  btx drift --sources code=DIR math=DIR seed=DIR
  btx drift --sources code=DIR math=DIR seed=DIR --out drift     drift.json and drift.svg as well

For every group of tensors (embeddings, attention, FFN, norms, head): relative L2 distance, cosine,
and the cosine of what each model has learned since --seed-model. Nothing is mixed."""

_VERIFY = """examples:
  btx mix --sources code=DIR math=DIR seed=DIR --out MIXTRAL
  btx verify MIXTRAL

exit codes: 0 every tensor agrees, 1 one does not, 2 it is no result of btx mix"""


def add_parser(commands: Any) -> None:
    """Add ``mix``, ``verify`` and ``drift`` to the command line."""
    parser = command(
        commands,
        "mix",
        "mix models offline: several checkpoints in, one out",
        _EPILOG,
    )
    _add_flags(parser)
    parser.add_argument("--report", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)
    parser = command(
        commands,
        "drift",
        "how far models have drifted from their seed and from each other",
        _DRIFT,
        "How far models have drifted from the seed they were branched from, and from each other.",
    )
    _add_flags(parser, ("sources", "out", "seed_model", "model"))
    parser.set_defaults(run=run_drift)
    parser = command(
        commands,
        "verify",
        "compute a result of btx mix again by plain loops and compare",
        _VERIFY,
        "Compute a result of btx mix again by plain loops, and compare.",
    )
    parser.add_argument("result", metavar="RESULT", help="the directory that btx mix wrote")
    parser.set_defaults(run=run_verify)


def run(options: argparse.Namespace) -> int:
    """``btx mix``."""
    if options.report:
        sys.stderr.write("hint: btx mix --report is now btx drift; the old name will go\n")
        return run_drift(options)
    request = request_of(options, "btx mix", ("sources", "out"))
    # Asks git, by a child that for an instant is as large as we are: now, while we are small.
    revision = code_revision()
    from megatron_btx.mix import offline

    offline.run(request, sys.stdout, revision)
    return 0


def run_drift(options: argparse.Namespace) -> int:
    """``btx drift``."""
    request = request_of(options, "btx drift", ("sources",))
    from megatron_btx.mix import drift

    drift.show(request, sys.stdout)
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """``btx verify``: 0 where every tensor agrees, 1 where one does not."""
    from megatron_btx.mix.reference import verify

    return verify.show(Path(options.result), sys.stdout)


def request_of(options: argparse.Namespace, name: str, needed: Sequence[str]) -> Request:
    """The file's options, the flags' on top.

    Args:
        options: as parsed.
        name: of the command.
        needed: fields that may not be empty.

    Raises:
        UserErrors: unknown keys and values of wrong types in the file, all at once.
    """
    given = {} if options.config is None else _from_file(Path(options.config))
    for one in dataclasses.fields(Request):
        value = getattr(options, one.name, None)
        if value is not None:
            given[one.name] = tuple(value) if isinstance(value, list) else value
    request = Request(**given)
    missing = [name for name in needed if not getattr(request, name)]
    if missing:
        raise UserError(name, f"--{' and --'.join(missing)} missing", f"see {name} --help")
    return request


def _add_flags(parser: argparse.ArgumentParser, names: Sequence[str] = ()) -> None:
    """One flag a field of :class:`Request`, or of those named; absent flags are None, so that a
    file can say it."""
    parser.add_argument("--config", metavar="YAML", help="these options from a file")
    helps = _field_docs()
    for one, hint in zip(dataclasses.fields(Request), _hints(), strict=True):
        if names and one.name not in names:
            continue
        flag = "--" + one.name.replace("_", "-")
        if typing.get_origin(hint) is dict:  # in a file only
            continue
        if hint is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=helps[one.name]
            )
            continue
        options: dict[str, Any] = {"default": None, "help": helps[one.name]}
        choices = [c for c in _choices(hint) if c is not None]
        if choices:
            options["choices"] = choices
        elif typing.get_origin(hint) is tuple:
            options |= {"nargs": "+", "metavar": "NAME=..."}
        else:
            options["type"] = next(k for k in (int, float, str) if k in (hint, *_members(hint)))
            options["metavar"] = one.name.upper()
        parser.add_argument(flag, **options)


def _from_file(path: Path) -> dict[str, Any]:
    import yaml

    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(str(path), f"cannot be read: {error}", "give a YAML file") from error
    if not isinstance(given, dict):
        raise UserError(str(path), "not a mapping of options", "write method: btx, and so on")
    fields = {f.name: hint for f, hint in zip(dataclasses.fields(Request), _hints(), strict=True)}
    errors = []
    for name, value in given.items():
        if name not in fields:
            what = f"unknown option {name}"
            errors.append(UserError(str(path), what, f"the options are {', '.join(fields)}"))
            continue
        if isinstance(value, list):
            given[name] = value = tuple(map(str, value))
        if not _fits(value, fields[name]):
            errors.append(UserError(f"{path}: {name}", f"{value!r} is no {_words(fields[name])}"))
    if errors:
        raise UserErrors(errors)
    return given


def _fits(value: Any, hint: Any) -> bool:
    choices = _choices(hint)
    if choices:
        return value in choices
    kinds = {typing.get_origin(kind) or kind for kind in (hint, *_members(hint))}
    if isinstance(value, bool):
        return bool in kinds
    return type(value) in kinds or (float in kinds and isinstance(value, int))


def _words(hint: Any) -> str:
    choices = _choices(hint)
    if choices:
        return "one of " + ", ".join(str(choice) for choice in choices if choice is not None)
    names = {tuple: "list", dict: "mapping"}
    return names.get(typing.get_origin(hint), getattr(hint, "__name__", str(hint)))


def _choices(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    for member in _members(hint):
        if typing.get_origin(member) is Literal:
            return (*typing.get_args(member), None)
    return ()


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union."""
    return typing.get_args(hint) if typing.get_origin(hint) not in (tuple, dict) else ()


def _hints() -> list[Any]:
    hints = typing.get_type_hints(Request)
    return [hints[one.name] for one in dataclasses.fields(Request)]


def _field_docs() -> dict[str, str]:
    """The string under each field, which is its help."""
    import ast
    import inspect

    (body,) = ast.parse(inspect.getsource(Request)).body
    docs: dict[str, Any] = {}
    name = ""
    for statement in typing.cast(ast.ClassDef, body).body:
        if isinstance(statement, ast.AnnAssign):
            name = typing.cast(ast.Name, statement.target).id
        elif isinstance(statement, ast.Expr) and name:
            docs[name] = typing.cast(ast.Constant, statement.value).value
    return {field: str(text) for field, text in docs.items()}
