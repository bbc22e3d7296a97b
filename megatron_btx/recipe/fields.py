"""What a field of a block may hold, said beside the field: its range, or that it is a path."""

from __future__ import annotations

import ast
import dataclasses
import glob
import inspect
import itertools
import os
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.errors import notice
from megatron_btx.recipe.messages import show

UTMOST = 10**18
"""The highest value of any number: beyond it is a typing error."""
COUNT = 10**6
"""That of ranks, sequences and the like, far above all that exists."""


@dataclass(frozen=True, slots=True)
class Range:
    """The lowest and the highest value of a number, or of each number of a list."""

    low: float
    high: float

    def problem(self, value: float) -> tuple[str, str] | None:
        """What is wrong with a value and the fix; ``None``: nothing."""
        if self.low <= value <= self.high:
            return None
        fix = (
            f"give at least {self.low:g}" if value < self.low else f"give at most {self.high:.10g}"
        )
        if self.high < 1000:
            fix = f"give {self.low:g} to {self.high:.10g}"
        return f"is {show(value)}, out of range", fix

    def __str__(self) -> str:
        """As the reference of keys has it."""
        return (
            f"at least {self.low:g}" if self.high == UTMOST else f"{self.low:g} to {self.high:.10g}"
        )


def within(
    low: float,
    high: float = UTMOST,
    *,
    default: Any = dataclasses.MISSING,
    default_factory: Any = dataclasses.MISSING,
) -> Any:
    """A field of one number (or some) with its range, and with its default if any."""
    metadata = {"range": Range(low, high)}
    if default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


PATH = {"path": True}
"""Metadata of a field of a path, or several: from the directory of the file that names them."""


def path(default: Any = None) -> Any:
    """Such a field."""
    return dataclasses.field(default=default, metadata=PATH)


def run_path(default: Any) -> Any:
    """Likewise, but of runs: relative as long as it can be, and see :func:`beside`."""
    return dataclasses.field(default=default, metadata={"path": "run"})


def beside(path: str, file: Path | None, key: str) -> str:
    """``path`` from the directory of the file that names it, ``*`` allowed; what was begun from the
    current directory, as releases before had it, is still found there, with a hint.

    Args:
        path: as it is written.
        file: ``None``: it is not written in any, and stands as it is.
        key: named in the hint.
    """
    path = os.path.expanduser(path)
    if file is None or os.path.isabs(path):
        return path
    anchored = os.path.normpath(file.parent / path)
    if _is_there(anchored) or not _is_there(path):
        return anchored
    notice(f"{key}: {path} is taken from the current directory, as before; it means {anchored} now")
    return path


def _is_there(path: str) -> bool:
    return os.path.lexists(path) or any(glob.iglob(path))


def renamed(default: Any, formerly: str) -> Any:
    """A field that had another name: that is still read, and content hashes still have it."""
    return dataclasses.field(default=default, metadata={"formerly": formerly})


def of_before(default: Any, hashed: Callable[[Any], tuple[str, Any]]) -> Any:
    """A field that can say what another said before it: ``hashed`` gives the name and the value
    that content hashes have for a value, so that what was made before stays finished."""
    return dataclasses.field(default=default, metadata={"hashed": hashed})


def like(cls: type, name: str) -> Any:
    """A dataclass field with the default and the range of field ``name`` of ``cls``."""
    (field,) = (field for field in dataclasses.fields(cls) if field.name == name)
    return dataclasses.field(default=field.default, metadata=field.metadata)


def out_of_range(block: Any) -> Iterator[tuple[str, str, str]]:
    """Numbers of a block that are outside their ranges: field, what is wrong, fix."""
    for one in dataclasses.fields(block):
        value, limits = getattr(block, one.name), one.metadata.get("range")
        if limits is None or value is None:
            continue
        each = value.values() if isinstance(value, dict) else value
        each = each if isinstance(value, (dict, tuple)) else [value]
        wrong = next(filter(None, map(limits.problem, each)), None)
        if wrong is not None:
            yield one.name, *wrong


def field_docs(cls: type) -> dict[str, str]:
    """The text under each field of a block, that of a base class too."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    docs = {
        name: text
        for base in cls.__bases__
        if dataclasses.is_dataclass(base)
        for name, text in field_docs(base).items()
    }
    for field, below in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(below.value, ast.Constant)
            docs[field.target.id] = str(below.value.value)
    return docs
