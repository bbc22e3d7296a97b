"""``btx mix``, ``btx drift`` and ``btx verify``. Imports no torch until one runs."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from megatron_btx.cli.common import command
from megatron_btx.errors import UserError, UserErrors, collect_errors
from megatron_btx.files import named_path, newest_step
from megatron_btx.mix import mergekit_config
from megatron_btx.mix.request import MixRequest
from megatron_btx.provenance import code_revision
from megatron_btx.recipe.fields import beside, field_docs
from megatron_btx.recipe.messages import flag_of
from megatron_btx.recipe.typed import Reader
from megatron_btx.recipe.yaml_tree import Node, read_tree, tree_of

_EPILOG = """examples:
  btx mix --sources code=DIR math=DIR seed=DIR --out MIXTRAL
  btx mix --sources code=DIR math=DIR --out MOE --format megatron --dry-run
  btx mix --method upcycle --copies 8 --sources DIR --out MIXTRAL --memory 2GiB
  btx mix --config mix.yaml --out MIXTRAL         options in a file, named like the flags
  btx mix --config mergekit-moe.yaml --out MIXTRAL    a file of mergekit-moe, unchanged

A source is a Hugging Face directory (docs/convert.md) or a Megatron step directory, of btx, of
Megatron-LM or of Megatron-Bridge (docs/megatron.md). After an interruption, the
same command continues from the finished files."""

_DRIFT = """examples:
  btx drift --sources code=DIR math=DIR seed=DIR
  btx drift --sources code=DIR math=DIR seed=DIR --out drift     drift.json and drift.svg as well
  btx drift --sources code=DIR seed=DIR --out drift.svg          or one file: .svg, .csv, .json

For every group of tensors (embeddings, attention, FFN, norms, head): relative L2 distance, cosine,
and the cosine of what each model has learned since --seed-model. Nothing is mixed."""

_VERIFY = """examples:
  btx mix --sources code=DIR math=DIR seed=DIR --out MIXTRAL
  btx verify MIXTRAL
  btx verify MIXTRAL --record      and put what was found into verification.json and the card

exit codes: 0 all tensors agree, 1 some differ, 2 not a result of btx mix"""


def add_parser(commands: Any) -> None:
    """Add ``mix``, ``verify`` and ``drift`` to the command line."""
    parser = command(commands, "mix", "mix several checkpoints into one, offline", _EPILOG)
    _add_flags(parser)
    parser.add_argument("--report", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)
    parser = command(
        commands,
        "drift",
        "measure how far models are from their seed and from each other",
        _DRIFT,
        "Measure how far models are from the seed they were branched from, and from each other.",
    )
    _add_flags(parser, ("sources", "out", "seed_model", "model"))
    parser.set_defaults(run=run_drift)
    parser = command(
        commands,
        "verify",
        "recompute a result of btx mix with plain loops and compare",
        _VERIFY,
        "Recompute a result of btx mix with plain loops, and compare.",
    )
    parser.add_argument(
        "result", metavar="RESULT", help="the directory that btx mix wrote, or a stage's"
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help="if all tensors agree, record it in its verification.json and README.md",
    )
    parser.set_defaults(run=run_verify)


def run(options: argparse.Namespace) -> int:
    """``btx mix``."""
    if options.report:
        sys.stderr.write("hint: btx mix --report is now btx drift; the old name will go\n")
        return run_drift(options)
    config = None if options.config is None else _read(Path(options.config))
    gates = None
    if config is not None and mergekit_config.is_mergekit(config):
        _refuse_beside_mergekit(options)
        config, gates = mergekit_config.read(config)
    request = _built(options, "btx mix", ("sources", "out"), config)
    # This forks (to ask git), and a fork needs as much memory as this process has: so first.
    revision = code_revision()
    from megatron_btx.mix import offline

    offline.run(request, sys.stdout, revision, gates)
    return 0


def _refuse_beside_mergekit(options: argparse.Namespace) -> None:
    """Flags that would say again, or otherwise, what a file of mergekit's says.

    Raises:
        UserErrors: all that are given.
    """
    said = ("sources", "base", "router_init", "router_init_std", "centroids")
    what, fix = f"is what {options.config} says", "leave the flag out, or change the file"
    given = [name for name in said if getattr(options, name) is not None]
    if given:
        raise UserErrors([UserError(flag_of(n), what, fix) for n in given])


def run_drift(options: argparse.Namespace) -> int:
    """``btx drift``."""
    request = request_of(options, "btx drift", ("sources",))
    from megatron_btx.mix import drift

    drift.show(request, sys.stdout)
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """``btx verify``: 0 where every tensor agrees, 1 where one does not."""
    from megatron_btx.mix.reference import verify

    result = Path(options.result)
    result = newest_step(result) or result  # a stage's directory stands for its last step
    return verify.show(result, sys.stdout, keep=options.record)


def request_of(options: argparse.Namespace, name: str, needed: Sequence[str]) -> MixRequest:
    """The file's options, the flags' on top.

    Args:
        options: as parsed.
        name: of the command.
        needed: fields that may not be empty.

    Raises:
        UserErrors: unknown keys in the file, wrong types and numbers out of range, all at once.
    """
    config = None if options.config is None else _read(Path(options.config))
    return _built(options, name, needed, config)


def _built(
    options: argparse.Namespace, name: str, needed: Sequence[str], config: Node | None
) -> MixRequest:
    layers = [] if config is None else [config]
    flags = {
        one.name: replace(tree_of(value, None), key=flag_of(one.name))
        for one in dataclasses.fields(MixRequest)
        if (value := getattr(options, one.name, None)) is not None
    }
    reader = Reader(noun="btx mix's options")
    request: MixRequest = reader.instance(MixRequest, [*layers, Node(flags, None, 0, "")], "")
    errors: list[UserError] = []
    with collect_errors(errors):
        reader.raise_errors()
    wrong = reader.marks if errors else ()  # what was given, and may be among them
    missing = [one for one in needed if not getattr(request, one) and one not in wrong]
    if missing:
        what = f"--{' and --'.join(missing)} missing"
        errors.append(UserError(name, what, f"see {name} --help"))
    if errors:
        raise UserErrors(errors)
    return request


def _read(config: Path) -> Node:
    """The options in a file, their paths from the directory that it stands in."""
    tree = read_tree(config, "options")
    entries = {
        name: _PATHS[name](node) if name in _PATHS else node for name, node in tree.value.items()
    }
    for name in ("average", "average_groups"):
        if name in entries:
            entries[name] = _weights(entries[name])
    return replace(tree, value=entries)


def _weights(node: Node) -> Node:
    """A mapping of weights, as a recipe has them, in the words of the flag: ``NAME=WEIGHT``, and
    ``GROUP:NAME=WEIGHT`` of a mapping of such mappings."""
    if not isinstance(node.value, dict):
        return node
    words = []
    for name, one in node.value.items():
        for below, weight in one.value.items() if isinstance(one.value, dict) else [("", one)]:
            word = f"{name}:{below}" if below else name
            words.append(replace(weight, value=f"{word}={weight.plain()}"))
    return replace(node, value=words)


def _anchored(node: Node) -> Node:
    if isinstance(node.value, list):
        return replace(node, value=[_anchored(item) for item in node.value])
    if not isinstance(node.value, str):  # refused when the request is built
        return node
    name, path = named_path(node.value)
    if node.file is not None and os.path.lexists(node.file.parent / node.value):
        name, path = "", Path(node.value)
    anchored = beside(str(path), node.file, node.key)
    return replace(node, value=f"{name}={anchored}" if name else anchored)


def _sources(node: Node) -> Node:
    """A mapping ``NAME: DIR`` in the words of the flag, ``NAME=DIR``."""
    if not isinstance(node.value, dict):
        return _anchored(node)
    words = [
        replace(one, value=f"{name}={beside(one.value, one.file, one.key)}")
        if isinstance(one.value, str)
        else one
        for name, one in node.value.items()
    ]
    return replace(node, value=words)


_PATHS = {"sources": _sources, "out": _anchored, "centroids": _anchored}
"""Options that hold paths."""


def _add_flags(parser: argparse.ArgumentParser, names: Sequence[str] = ()) -> None:
    """One flag a field of :class:`MixRequest`, or of those named; absent flags are None, so that
    ``--config`` can set them."""
    parser.add_argument("--config", metavar="YAML", help="read these options from a file")
    helps = field_docs(MixRequest)
    for one, hint in zip(dataclasses.fields(MixRequest), _hints(), strict=True):
        if names and one.name not in names:
            continue
        flag = flag_of(one.name)
        if typing.get_origin(hint) is dict:  # in a file only
            continue
        if hint is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=helps[one.name]
            )
            continue
        options: dict[str, Any] = {"default": None, "help": _help(one, helps[one.name])}
        choices = [c for c in _choices(hint) if c is not None]
        if choices:
            options["choices"] = choices
        elif typing.get_origin(hint) is tuple:
            options |= {"nargs": "+", "metavar": "NAME=..."}
        else:
            options["type"] = next(k for k in (int, float, str) if k in (hint, *_members(hint)))
            options["metavar"] = one.name.upper()
        parser.add_argument(flag, **options)


def _help(one: dataclasses.Field[Any], doc: str) -> str:
    """A flag's line, with the default where the line does not tell it and there is one."""
    unsaid = "(default:" not in doc and one.default not in (None, "", (), dataclasses.MISSING)
    return (f"{doc} (default: {one.default})" if unsaid else doc).replace("%", "%%")


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
    hints = typing.get_type_hints(MixRequest)
    return [hints[one.name] for one in dataclasses.fields(MixRequest)]
