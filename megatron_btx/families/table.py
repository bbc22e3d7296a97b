"""Names of a family as data: one aligned table, read in both directions.

Each row joins Hugging Face tensors into one canonical tensor, rows group by group, or stacks
canonical tensors into a Hugging Face one. That one description gives both directions: no inverse is
written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.count import expert_width, kv_channels, query_groups
from megatron_btx.recipe.schema import Model
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.ops import cat, item, reshape, rows, stack


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
            return cat(parts)
        rest = parts[0].shape[1:]
        grouped = tuple(
            reshape(part, (self.groups, size, *rest))
            for part, size in zip(parts, self.sizes, strict=True)
        )
        return reshape(cat(grouped, 1), (self.groups * sum(self.sizes), *rest))

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


@dataclass(frozen=True)
class Fused:
    """One tensor that holds parts one after the other, each whole, where the canonical one
    interleaves them."""

    parts: Interleave

    def join(self, parts: Sequence[Expression]) -> Expression:
        """The one tensor with its rows in the canonical order."""
        (whole,) = parts
        return self.parts.join(self._plain.split(whole))

    def split(self, whole: Expression) -> list[Expression]:
        """The inverse, alone in a list."""
        return [self._plain.join(self.parts.split(whole))]

    @property
    def _plain(self) -> Interleave:
        return Interleave(1, tuple(self.parts.groups * size for size in self.parts.sizes))


def qkv(model: Model) -> Interleave:
    """Megatron's fused attention input, weights or biases: for every key/value head its query
    heads, it, its value."""
    queries = model.num_attention_heads // query_groups(model)
    return Interleave(query_groups(model), tuple(n * kv_channels(model) for n in (queries, 1, 1)))


def fused_qkv(model: Model) -> Fused:
    """The same from one tensor: all queries, all keys, all values."""
    return Fused(qkv(model))


def gate_up(model: Model) -> Interleave:
    """Megatron's gated fc1: all of the gate, then all of the up projection."""
    return Interleave(1, (model.ffn_hidden_size,) * 2)


def expert_gate_up(model: Model) -> Interleave:
    """The same of an expert."""
    return Interleave(1, (expert_width(model),) * 2)


def shared_gate_up(model: Model) -> Interleave:
    """The same of a shared expert."""
    return Interleave(1, (model.moe_shared_expert_intermediate_size or 0,) * 2)


Operator = Callable[[Model], Interleave | Fused]
Row = tuple[str, tuple[str, ...], Operator | None]
"""A canonical name, the Hugging Face names that it is joined from, how (``None``: one, as it is).
``{layer}`` and ``{expert}`` stand for every layer and every expert; where only the canonical name
has an expert, the Hugging Face tensor is all of them, stacked."""


@dataclass(frozen=True)
class Joined:
    """One row for one layer, and for one expert or all of them."""

    canonical: tuple[str, ...]
    """One name, or every expert's where ``stacked``."""
    hf: tuple[str, ...]
    operator: Interleave | Fused | None = None
    stacked: bool = False


@dataclass(frozen=True)
class Table:
    """The rows of a family, in the order of the forward pass."""

    rows: tuple[Row, ...]

    def to_canonical(
        self, hf: Mapping[str, Expression], architecture: Architecture
    ) -> dict[str, Expression]:
        """Canonical tensors from Hugging Face ones."""
        named: dict[str, Expression] = {}
        for row in self.expanded(architecture):
            if row.hf[0] not in hf:  # a head that is tied, biases that this model has not
                continue
            parts = [hf[name] for name in row.hf]
            if row.stacked:
                named.update((name, item(parts[0], at)) for at, name in enumerate(row.canonical))
            else:
                whole = row.operator.join(parts) if row.operator else parts[0]
                named[row.canonical[0]] = whole
        return named

    def to_hf(
        self, canonical: Mapping[str, Expression], architecture: Architecture
    ) -> dict[str, Expression]:
        """Hugging Face tensors from canonical ones, in their order."""
        of = {name: row for row in self.expanded(architecture) for name in row.canonical}
        named: dict[str, Expression] = {}
        for name, whole in canonical.items():
            row = of[name]
            if not row.stacked:
                parts = row.operator.split(whole) if row.operator else [whole]
                named.update(zip(row.hf, parts, strict=True))
            elif name == row.canonical[0]:  # all of them, where the first one stands
                named[row.hf[0]] = stack([canonical[each] for each in row.canonical])
        return named

    def expanded(self, architecture: Architecture) -> Iterator[Joined]:
        """Every row for every layer and expert."""
        model, experts = architecture.model, range(len(architecture.experts))
        for name, names, operator in self.rows:
            built = operator(model) if operator else None
            stacked = "{expert}" in name and "{expert}" not in names[0]
            for layer in range(model.num_layers if "{layer}" in name else 1):
                if stacked:
                    every = tuple(name.format(layer=layer, expert=e) for e in experts)
                    yield Joined(every, (names[0].format(layer=layer),), stacked=True)
                    continue
                for expert in experts if "{expert}" in name else range(1):
                    number = {"layer": layer, "expert": expert}
                    filled = tuple(one.format(**number) for one in names)
                    yield Joined((name.format(**number),), filled, built)
