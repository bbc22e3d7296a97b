"""Names of a family as data: one aligned table, read in both directions.

Each row joins Hugging Face tensors into one canonical tensor, rows group by group. That one
description gives both directions: nobody writes an inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.count import kv_channels, query_groups
from megatron_btx.recipe.schema import Model
from megatron_btx.weights.build import reshape, rows
from megatron_btx.weights.expression import Cat, Expression


@dataclass(frozen=True)
class Interleave:
    """Tensors joined along their rows, a group of each at a time: group 0 of every part, then group
    1 of every part, and so on."""

    groups: int
    sizes: tuple[int, ...]
    """Rows a group of each part."""

    def join(self, parts: Sequence[Expression]) -> Expression:
        """``[groups * size, ...]`` of each part -> ``[groups * sum(sizes), ...]``."""
        if self.groups == 1:
            return Cat(tuple(parts), 0)
        rest = parts[0].shape[1:]
        grouped = tuple(
            reshape(part, (self.groups, size, *rest))
            for part, size in zip(parts, self.sizes, strict=True)
        )
        return reshape(Cat(grouped, 1), (self.groups * sum(self.sizes), *rest))

    def split(self, whole: Expression) -> list[Expression]:
        """The parts of what :meth:`join` joined."""
        ends = list(accumulate(self.sizes))
        cuts = [(end - size, end) for size, end in zip(self.sizes, ends, strict=True)]
        if self.groups == 1:
            return [rows(whole, start, end) for start, end in cuts]
        rest = whole.shape[1:]
        grouped = reshape(whole, (self.groups, ends[-1], *rest))
        return [
            reshape(rows(grouped, start, end, 1), (self.groups * (end - start), *rest))
            for start, end in cuts
        ]


def qkv(model: Model) -> Interleave:
    """Megatron's fused attention input: for every key/value head its query heads, it, its value."""
    queries = model.num_attention_heads // query_groups(model)
    return Interleave(query_groups(model), tuple(n * kv_channels(model) for n in (queries, 1, 1)))


def gate_up(model: Model) -> Interleave:
    """Megatron's gated fc1: all of the gate, then all of the up projection."""
    return Interleave(1, (model.ffn_hidden_size, model.ffn_hidden_size))


Operator = Callable[[Model], Interleave]
Row = tuple[str, tuple[str, ...], Operator | None]
"""A canonical name, the Hugging Face names that it is joined from, how (``None``: one, as it is).
``{layer}`` and ``{expert}`` stand for every layer and every expert."""


@dataclass(frozen=True)
class Table:
    """The rows of a family, in the order of the forward pass."""

    rows: tuple[Row, ...]

    def to_canonical(
        self, hf: Mapping[str, Expression], architecture: Architecture
    ) -> dict[str, Expression]:
        """Canonical tensors from Hugging Face ones."""
        named = {}
        for canonical, names, operator in self.expanded(architecture):
            if names[0] in hf:  # a tied head is not
                parts = [hf[name] for name in names]
                named[canonical] = operator.join(parts) if operator else parts[0]
        return named

    def to_hf(
        self, canonical: Mapping[str, Expression], architecture: Architecture
    ) -> dict[str, Expression]:
        """Hugging Face tensors from canonical ones, in their order."""
        of = {name: (names, op) for name, names, op in self.expanded(architecture)}
        named: dict[str, Expression] = {}
        for name, whole in canonical.items():
            names, operator = of[name]
            parts = operator.split(whole) if operator else [whole]
            named.update(zip(names, parts, strict=True))
        return named

    def expanded(
        self, architecture: Architecture
    ) -> Iterator[tuple[str, tuple[str, ...], Interleave | None]]:
        """Every row for every layer and expert."""
        model = architecture.model
        for name, names, operator in self.rows:
            built = operator(model) if operator else None
            for layer in range(model.num_layers if "{layer}" in name else 1):
                for expert in range(len(architecture.experts) if "{expert}" in name else 1):
                    number = {"layer": layer, "expert": expert}
                    filled = tuple(one.format(**number) for one in names)
                    yield name.format(**number), filled, built
