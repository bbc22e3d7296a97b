"""Task files of lm-eval's form, read without running what they name.

Such a file can execute code in three ways: it names Python functions (``!function``), it names a
metric or a kind of data set that is a script or a pickle, and its Jinja templates reach Python's
internals. All three need the user's consent (``--allow-code-execution``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.errors import UserError
from megatron_btx.files import read_bytes

_BYTES = 1 << 20
_NODES = 100_000
"""Of a file, aliases written out."""

_DATA = ("json", "csv", "parquet", "arrow", "text")
"""Kinds of data sets that are read without running anything; ``pandas`` reads pickles."""

CONSENT = "add --allow-code-execution if you trust this file"


def load_task(path: Path, *, allow_code: bool) -> dict[str, Any]:
    """A task file and those that it includes.

    Args:
        path: the YAML file.
        allow_code: whether functions that it names may be imported.

    Raises:
        UserError: there is none, it is damaged, or it names code that may not be run.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    _check(path, allow_code, ())
    try:
        return load_yaml(path)
    except Exception as error:  # what a user's file, or the function that it names, may raise
        what = f"is no task: {type(error).__name__}: {first_line(error)}"
        raise UserError(str(path), what, "see lm-eval's task guide") from error


def check_config(path: Path, config: dict[str, Any]) -> None:
    """That a task, its items known, runs no code by its data set or its metrics.

    Raises:
        UserError: it does.
    """
    from lm_eval.api import metrics  # noqa: F401 - fills the registry
    from lm_eval.api.registry import metric_registry

    kind = config.get("dataset_path")
    if kind not in _DATA:
        what = f"dataset_path {kind!r} is none of {', '.join(_DATA)} and may run code"
        raise UserError(str(path), what, f"give its items as NAME=FILE.jsonl, or {CONSENT}")
    listed = config.get("metric_list") or []
    for one in listed if isinstance(listed, list) else [listed]:
        name = one.get("metric") if isinstance(one, dict) else one
        ours = isinstance(name, str) and name in metric_registry
        # What a task's own function returns has names of its own; the function had its consent.
        if not callable(config.get("process_results")) and (
            not ours or (isinstance(one, dict) and one.get("hf_evaluate"))
        ):
            what = f"metric {name!r} is not one of lm-eval's own and may run code"
            raise UserError(str(path), what, CONSENT)


def files_named(path: Path) -> list[Path]:
    """A task file, those that it includes, and all other files that a text in them names."""
    found: list[Path] = []
    left = [path]
    while left:
        file = left.pop()
        if file.resolve() in found:
            continue
        found.append(file.resolve())
        if file.suffix in (".yaml", ".yml"):
            left += _named_in(file)
    return found


def _named_in(file: Path) -> Iterator[Path]:
    """The files that a YAML file names, from its directory or from here; of what is no YAML none:
    whoever reads the task says so."""
    try:
        root = yaml.compose(read_bytes(file, _BYTES), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError, UserError):
        return
    for node in _nodes(root) if root is not None else ():
        if isinstance(node, yaml.ScalarNode) and 0 < len(node.value) < 4096:
            for path in (Path(node.value), file.parent / node.value):
                with suppress(OSError, ValueError):  # of texts that could be no file's name
                    if path.is_file():
                        yield path


@contextmanager
def templates(*, allow_code: bool) -> Iterator[None]:
    """Within it lm-eval renders templates in Jinja's sandbox, unless code is allowed."""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    before = utils.env
    if not allow_code:
        sandbox = ImmutableSandboxedEnvironment(
            loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
        )
        sandbox.filters.update(before.filters)
        utils.env = sandbox
    try:
        yield
    finally:
        utils.env = before


@contextmanager
def task_errors(name: str, path: Path) -> Iterator[None]:
    """A block whose errors are those of a task's file or its items.

    Raises:
        UserError: instead of what jinja, pyarrow or lm-eval raise.
    """
    from jinja2.exceptions import SecurityError

    try:
        yield
    except UserError:
        raise
    except SecurityError as error:
        what = f"its template would run code: {first_line(error)}"
        raise UserError(f"--tasks {name}", what, CONSENT) from error
    except Exception as error:
        raise UserError(
            f"--tasks {name}",
            f"its items do not fit: {type(error).__name__}: {first_line(error)}",
            f"look at {path} for the keys that it needs",
        ) from error


def first_line(error: BaseException) -> str:
    """Of what an exception says, for a message."""
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]


def _check(path: Path, allow_code: bool, includes: tuple[Path, ...]) -> None:
    """A file's nodes, nothing constructed, then those of what it includes."""
    where = path.expanduser().resolve()
    if where in includes:
        raise UserError(str(path), "includes itself", "take the include out")
    text = read_bytes(path, _BYTES)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        expanded = _expanded(root, {}) if root is not None else 0
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        what = f"is no YAML: {first_line(error)}"
        raise UserError(str(path), what, "see lm-eval's task guide") from error
    if not isinstance(root, yaml.MappingNode) or expanded > _NODES:
        what = "is no mapping of keys to values" if expanded <= _NODES else "is too large"
        raise UserError(str(path), what, "see lm-eval's task guide")
    functions = [node.value for node in _nodes(root) if node.tag == "!function"]
    if functions and not allow_code:
        what = f"names Python functions, which would be run: {', '.join(map(str, functions[:5]))}"
        raise UserError(str(path), what, CONSENT)
    for key, value in root.value:
        if key.value == "include":
            several = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for one in several:
                _check(where.parent / str(one.value), allow_code, (*includes, where))


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """Each node once."""
    seen: set[int] = set()
    left = [root]
    while left:
        node = left.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            left += _below(node)


def _below(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes there are with every alias written out."""
    if id(node) not in known:
        known[id(node)] = _NODES + 1  # an alias within its own anchor has no end
        known[id(node)] = 1 + sum(_expanded(below, known) for below in _below(node))
    return known[id(node)]
