"""A plan: what every target tensor is made of, and what becomes of every source tensor."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_btx.errors import UserError, UserErrors, capped
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.weights import source as at_rest
from megatron_btx.weights.arrange import Take
from megatron_btx.weights.box import Box, Shape, whole
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.ops import nbytes, rebuilt, takes
from megatron_btx.weights.source import Source, View, take_all


@dataclass(frozen=True)
class Ignore:
    """Stored things that a plan leaves out on purpose: a full match of their names, and why."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class Checkpoint:
    """A model at rest, opened: a source under canonical names, and what the model is."""

    label: str
    """Its name in expressions, plans and errors."""
    path: Path | None
    architecture: Architecture
    source: Source
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """What its directory says of itself, as read."""

    @cached_property
    def tensors(self) -> Mapping[str, Expression]:
        """Its tensors by canonical name."""
        return take_all(self.label, self.source)


@dataclass(frozen=True)
class Plan:
    """Every target tensor's expression, complete on both sides or refused.

    Args:
        architecture: the model that is built.
        targets: name -> expression, in the order in which they are made.
        sources: label -> source, for the takes in the expressions.
        expected: the names and shapes that ``targets`` must have.
        ignored: by label, the source tensors that need not be used.

    Raises:
        UserErrors: every target missing, unexpected or of another shape and every source tensor
            neither used nor ignored, all at once.
    """

    architecture: Architecture
    targets: Mapping[str, Expression]
    sources: Mapping[str, Source]
    expected: Mapping[str, Shape]
    ignored: Mapping[str, tuple[Ignore, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        errors = mismatches(self.targets, self.expected, "the plan's result")
        used = {take for target in self.targets.values() for take in takes(target)}
        for label, source in self.sources.items():
            there = take_all(label, source)
            unused = [name for name, take in there.items() if take not in used]
            errors += capped(
                [
                    UserError(label, f"tensor {name} is used by nothing in the result")
                    for name in unmatched(unused, self.ignored.get(label, ()))
                ]
            )
        absent = {take for take in used if not _holds(self.sources, take)}
        errors += capped(
            [
                UserError(take.source, f"has no tensor {take.name} {take.shape} {take.dtype}")
                for take in sorted(absent, key=str)
            ]
        )
        if errors:
            raise UserErrors(errors)

    def read(self, source: str, name: str, box: Box) -> Tensor:
        """What expressions are evaluated with."""
        return self.sources[source].read(name, box)

    def evaluate(self, name: str, box: Box | None = None) -> Tensor:
        """One target, or a box of it. The result may lie in mapped pages: never write to it."""
        target = self.targets[name]
        return target.evaluate(whole(target.shape) if box is None else box, self.read)

    def bytes_to_read(self, target: Expression, box: Box) -> Counter[str]:
        """Bytes that evaluating a box of an expression over the sources reads of each."""
        found: Counter[str] = Counter()
        for source, name, part in target.reads(box):
            found[source] += at_rest.nbytes(self.sources[source], name, part)
        return found

    def resolved(self, target: Expression) -> Expression:
        """An expression over the sources' names as one over what they store, in its simplest form:
        what one view joins and the next takes apart is never joined. For :meth:`read_stored`."""

        def leaf(take: Take) -> Expression:
            source = self.sources[take.source]
            return source.expressions[take.name] if isinstance(source, View) else take

        return rebuilt(target, leaf)

    def read_stored(self, source: str, name: str, box: Box) -> Tensor:
        """What resolved expressions are evaluated with."""
        found = self.sources[source]
        return (found.of if isinstance(found, View) else found).read(name, box)

    @property
    def nbytes(self) -> int:
        """Bytes of the result's tensors."""
        return sum(nbytes(target) for target in self.targets.values())

    @property
    def bytes_read(self) -> dict[str, int]:
        """Bytes that each source has handed out so far."""
        return {label: source.bytes_read for label, source in self.sources.items()}

    def files(self) -> dict[Path, list[str]]:
        """The files that the sources read, by directory."""
        found: dict[Path, list[str]] = {}
        for label in sorted(self.sources):
            for path in self.sources[label].files():
                found.setdefault(path.parent, []).append(path.name)
        return found

    def check_unchanged(self) -> None:
        """To be called when all is read.

        Raises:
            UserErrors: files of the sources that were written to meanwhile.
        """
        errors = [error for source in self.sources.values() for error in source.changed()]
        if errors:
            raise UserErrors(list({str(error): error for error in errors}.values()))

    @property
    def hash(self) -> str:
        """SHA-256 over every name and expression: equal plans over equal sources, equal results."""
        digest = hashlib.sha256()
        for name, target in sorted(self.targets.items()):
            digest.update(f"{name} = {target!r}\n".encode())
        return digest.hexdigest()

    @property
    def identity(self) -> str:
        """The plan and its sources as they are now: what an interrupted run is recognised by."""
        stamps = (f"{label}: {source.stamp}" for label, source in sorted(self.sources.items()))
        return hashlib.sha256("\n".join((self.hash, *stamps)).encode()).hexdigest()

    def describe(self) -> str:
        """The plan for people: one line per kind of tensor, layers taken together."""
        kinds: Counter[tuple[str, str, str]] = Counter()
        sizes: Counter[tuple[str, str, str]] = Counter()
        for name, target in self.targets.items():
            dtype = str(target.dtype).removeprefix("torch.")
            kind = (_any_layer(name), _any_layer(str(target)), dtype)
            kinds[kind] += 1
            sizes[kind] += nbytes(target)
        lines = [
            f"{name}\n    = {made_of}\n    {count} x {dtype}, {sizes[name, made_of, dtype]:,} bytes"
            for (name, made_of, dtype), count in kinds.items()
        ]
        parameters = sum(prod(target.shape) for target in self.targets.values())
        reads = sum(nbytes(take) for target in self.targets.values() for take in takes(target))
        lines += [
            f"{len(self.targets)} tensors, {parameters:,} parameters",
            f"{reads:,} bytes read, {self.nbytes:,} bytes written",
            f"plan {self.hash[:16]}",
        ]
        return "\n".join(lines)


def unmatched(names: Iterable[str], ignored: Sequence[Ignore]) -> list[str]:
    """The names that no declared ignore matches."""
    patterns = [re.compile(ignore.pattern) for ignore in ignored]
    return [name for name in names if not any(p.fullmatch(name) for p in patterns)]


def mismatches(
    found: Mapping[str, Expression], expected: Mapping[str, Shape], where: str, fix: str = ""
) -> list[UserError]:
    """Every tensor that is missing, unexpected or of another shape; of many of one kind the first,
    and their number."""
    missing = [f"{name} is missing" for name in expected if name not in found]
    more = [f"{name} is unexpected" for name in found if name not in expected]
    other = [
        f"{name} has shape {found[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    kinds = (
        [UserError(where, f"tensor {what}", fix) for what in w] for w in (missing, more, other)
    )
    return [error for kind in kinds for error in capped(kind)]


def _holds(sources: Mapping[str, Source], take: Take) -> bool:
    source = sources.get(take.source)
    return source is not None and source.tensors.get(take.name) == (take.shape, take.dtype)


def _any_layer(text: str) -> str:
    return re.sub(r"(layers\.)\d+", r"\1*", text)
