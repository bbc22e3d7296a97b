"""``btx mix``: the mixes offline, from and to both formats. Imports no torch until it runs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.provenance import code_revision

Method = Literal["btx", "upcycle", "split", "blend", "average", "append", "drop", "copy"]

_EPILOG = """examples:
  btx mix --sources code=DIR math=DIR seed=DIR --out MIXTRAL
  btx mix --sources code=DIR math=DIR --out MOE --format megatron --dry-run
  btx mix --method upcycle --copies 8 --sources DIR --out MIXTRAL --memory 2GiB
  btx mix --config mix.yaml --out MIXTRAL         options in a file, by the names of the flags

A source is a Hugging Face directory (docs/convert.md) or a Megatron step directory of btx. Started
again after an interruption, it goes on from the finished files."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to mix and how. Every field is a flag, and a key of ``--config``."""

    sources: tuple[str, ...] = ()
    """NAME=DIR or DIR, in the order of the experts"""
    out: str = ""
    """the new directory"""
    method: Method = "btx"
    """which mix"""
    format: Literal["hf", "megatron"] = "hf"
    """what the result is written as"""
    family: str = ""
    """the Hugging Face family to write, by its model_type (default: the first that computes it)"""
    fused: bool = False
    """stack the experts' tensors as transformers 5 names them (hf; default: one by one)"""
    dtype: Literal["bf16", "fp32", "fp16"] | None = None
    """of the result; without it, that of the sources"""
    average: tuple[str, ...] = ()
    """NAME=WEIGHT of every source in the average of what is no expert, or `tokens`: as many as each
    was trained on since --seed-model (default: uniform)"""
    average_groups: tuple[str, ...] = ()
    """GROUP:NAME=WEIGHT, other weights for embeddings, attention, norms or head"""
    dare: float | None = None
    """share of the differences from the seed that DARE drops from what is averaged"""
    seed_model: str = "seed"
    """the source from which the others were branched"""
    fold_norms: bool = False
    """fold each expert's own pre-FFN norm gain into it (btx)"""
    moe_router_topk: int = 2
    """experts a token"""
    router_init: Literal["normal", "zeros", "uniform", "centroids"] = "normal"
    """how routers are born"""
    centroids: str | None = None
    """the file of `btx centroids`, for --router-init centroids"""
    router_init_std: float = 0.02
    """their standard deviation, or half their interval"""
    random_seed: int = 1234
    """of routers, noise, re-initialisation and DARE"""
    copies: int = 8
    """experts of an upcycled model"""
    num_chunks: int = 1
    """pieces that each FFN is cut into (upcycle, split)"""
    scale: Literal["down", "cube_root", "none"] = "down"
    """what makes up for the cutting"""
    noise: float = 0.0
    """standard deviation of what is added to upcycled experts"""
    drop_ratio: float = 0.0
    """share of each upcycled expert's inner units that are drawn anew (Drop-Upcycling)"""
    expert: str = ""
    """the expert that drop takes out"""
    shard: str = "1GiB"
    """size of a file of the result: what an interruption loses at most"""
    memory: str = ""
    """peak resident memory, such as 2GiB (default: what is fastest)"""
    workers: int = 2
    """files written side by side"""
    model: dict[str, Any] = field(default_factory=dict)
    """what Megatron sources are that do not say so, in Megatron's words; in a file only"""
    dry_run: bool = False
    """print the plan, write nothing"""


def add_parser(commands: Any) -> None:
    """Mount ``btx mix`` and ``btx verify``."""
    parser = commands.add_parser(
        "mix",
        help="mix models offline: several checkpoints in, one out",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_flags(parser)
    parser.add_argument("--config", metavar="YAML", help="these options from a file")
    parser.add_argument(
        "--report",
        action="store_true",
        help="how far the sources have drifted from --seed-model and each other; writes nothing",
    )
    parser.set_defaults(run=run)
    verify = commands.add_parser(
        "verify", help="compute a result of btx mix again by plain loops and compare"
    )
    verify.add_argument("result", metavar="RESULT", help="the directory that btx mix wrote")
    verify.set_defaults(run=run_verify)


def run(options: argparse.Namespace) -> int:
    """``btx mix``."""
    request = request_of(options)
    # Asks git, by a child that for an instant is as large as we are: now, while we are small.
    revision = code_revision()
    if options.report:
        from megatron_btx.mix import drift

        drift.show(request, sys.stdout)
        return 0
    from megatron_btx.mix import offline

    offline.run(request, sys.stdout, revision)
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """``btx verify``: 0 where every tensor agrees, 1 where one does not."""
    from megatron_btx.mix.reference import verify

    return verify.show(Path(options.result), sys.stdout)


def request_of(options: argparse.Namespace) -> Request:
    """The file's options, the flags' on top.

    Raises:
        UserErrors: unknown keys and values of wrong types in the file, all at once.
    """
    given = {} if options.config is None else _from_file(Path(options.config))
    for one in dataclasses.fields(Request):
        value = getattr(options, one.name, None)
        if value is not None:
            given[one.name] = tuple(value) if isinstance(value, list) else value
    request = Request(**given)
    missing = [name for name in ("sources", "out") if not getattr(request, name)]
    if options.report:
        missing = [name for name in missing if name != "out"]
    if missing:
        raise UserError("btx mix", f"--{' and --'.join(missing)} missing", "see btx mix --help")
    return request


def _add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a field of :class:`Request`; absent flags are None, so that a file can say it."""
    helps = _field_docs()
    for one, hint in zip(dataclasses.fields(Request), _hints(), strict=True):
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
