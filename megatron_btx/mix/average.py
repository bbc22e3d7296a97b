"""Averages: what BTX does with all that is no expert, and a mix of its own (a dense result)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.mix.compatibility import disagreements, labels_of
from megatron_btx.recipe.check_mix import AVERAGED, BOTH, GROUPS
from megatron_btx.recipe.names import canonical_tensors, group_of
from megatron_btx.weights.arithmetic import Product, Ties, WeightedSum
from megatron_btx.weights.arrange import Take
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.ops import mean
from megatron_btx.weights.plan import Checkpoint, Plan
from megatron_btx.weights.random_fill import Draw
from megatron_btx.weights.source import Source
from megatron_btx.weights.statistics import thresholds

THRESHOLDS = "mix/thresholds"
"""Label of their source in a plan: with a ``/``, as no model's name has one."""
_GIVE = "give weights instead: its manifest counts no tokens"


@dataclass(frozen=True)
class Dare:
    """Drop and rescale (DARE, arXiv 2311.03099) what each model learned since the seed.

    MergeME (arXiv 2502.00997, table 1) found it better than the plain mean for what BTX averages.
    """

    seed_model: str
    """Label of the model from which the others were branched."""
    drop: float = 0.9
    """Share of the differences that is dropped; the rest is divided by ``1 - drop``."""
    seed: int = 0


@dataclass(frozen=True)
class Averaging:
    """How tensors are averaged: uniformly (the paper, section 3.2), by weights, with DARE."""

    weights: Mapping[str, float] | Literal["tokens"] | None = None
    """By model label, normalised; ``None``: uniform. ``tokens``: as many as each model was trained
    on since the seed, by its own manifest; the seed itself has weight zero, so the average is the
    seed plus the weighted mean of what the others learned."""
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Other weights for a kind of tensor (:func:`megatron_btx.recipe.names.group_of`)."""
    dare: Dare | None = None
    seed_model: str = "seed"
    """Label of the seed among the models, for ``tokens`` and TIES."""
    ties: float | None = None
    """Share of each model's differences from the seed that TIES (arXiv 2306.01708) keeps, the
    largest of every tensor in Megatron's form (q, k, v are one, gate and up are one)."""

    def of(self, name: str, models: Sequence[Checkpoint], dtype: torch.dtype) -> Expression:
        """The average of the tensor ``name``, accumulated in fp64, rounded once."""
        labels = labels_of(models)
        by_label = self._weights_of(group_of(name), models)
        weights = [by_label[label] for label in labels]
        parts = [model.tensors[name] for model in models]
        if self.ties is not None:
            return self._ties(name, models, weights, dtype)
        if self.dare is None:
            return mean(parts, dtype, weights)
        return self._dare(name, labels, parts, weights, dtype)

    def sources(
        self, models: Sequence[Checkpoint], averaged: Collection[str] = AVERAGED
    ) -> dict[str, Source]:
        """What a plan reads in which the groups ``averaged`` are averages: the models, and of TIES
        its thresholds."""
        own = {model.label: model.source for model in models}
        if self.ties is None:
            return own
        base = next(model for model in models if model.label == self.seed_model)
        moved = {
            f"{model.label}/{name}": _moved(model.tensors[name], base.tensors[name])
            for model in models
            if model is not base
            for name in base.tensors
            if group_of(name) in averaged
        }
        return own | ({THRESHOLDS: thresholds(own, moved, self.ties)} if moved else {})

    def _ties(
        self, name: str, models: Sequence[Checkpoint], weights: Sequence[float], dtype: torch.dtype
    ) -> Expression:
        base = next(model for model in models if model.label == self.seed_model)
        others = [(m, w) for m, w in zip(models, weights, strict=True) if m is not base]
        return Ties(
            base=base.tensors[name],
            models=tuple(model.tensors[name] for model, _ in others),
            thresholds=tuple(
                Take(THRESHOLDS, f"{model.label}/{name}/threshold", (), torch.float64)
                for model, _ in others
            ),
            weights=tuple(weight for _, weight in others),
            dtype=dtype,
        )

    def _weights_of(self, group: str, models: Sequence[Checkpoint]) -> Mapping[str, float]:
        if group in self.groups:
            return self.groups[group]
        if self.weights is None:
            return {model.label: 1.0 for model in models}
        if self.weights == "tokens":
            return {model.label: self._tokens(model) for model in models}
        return self.weights

    def _tokens(self, model: Checkpoint) -> float:
        return 0.0 if model.label == self.seed_model else float(model.manifest.get("tokens") or 0)

    def _dare(
        self,
        name: str,
        labels: Sequence[str],
        parts: Sequence[Expression],
        weights: Sequence[float],
        dtype: torch.dtype,
    ) -> Expression:
        """``seed + sum_i w_i keep_i (x_i - seed) / (1 - drop) / sum_i w_i``."""
        assert self.dare is not None
        kept = 1.0 - self.dare.drop
        base = parts[labels.index(self.dare.seed_model)]
        terms, factors = [base], [kept * sum(weights)]
        for label, part, weight in zip(labels, parts, weights, strict=True):
            if label == self.dare.seed_model:
                continue
            draw = Draw("keep", kept, self.dare.seed, f"{label}/{name}", part.shape, torch.float64)
            terms += [Product((x, draw), (), torch.float64) for x in (part, base)]
            factors += [weight, -weight]
        return WeightedSum(tuple(terms), tuple(factors), kept * sum(weights), dtype)

    def errors(
        self, models: Sequence[Checkpoint], averaged: Sequence[str] = AVERAGED
    ) -> list[UserError]:
        """What does not fit the models, of which the groups ``averaged`` are averaged."""
        labels = labels_of(models)
        found = []
        given = dict(self.groups)
        if self.weights == "tokens":
            found += [
                UserError(model.label, "does not say how many tokens it was trained on", _GIVE)
                for model in models
                if model.label != self.seed_model and not self._tokens(model)
            ]
        elif self.weights is not None:
            given[""] = self.weights
        for group, weights in given.items():
            where = f"mix.average_groups.{group}" if group else "mix.average"
            if set(weights) != set(labels):
                what = f"weights for {', '.join(weights)}; the mix is of {', '.join(labels)}"
                found.append(UserError(where, what, "give each model of the mix one weight"))
            elif not sum(weights.values()) > 0:
                found.append(UserError(where, "the weights do not sum to a positive number"))
            if group and group not in averaged:
                what = f"there is no group {group}"
                found.append(UserError(where, what, f"the groups are {', '.join(averaged)}"))
        if self.dare is not None and self.dare.seed_model not in labels:
            what = f"there is no model {self.dare.seed_model} to compare with"
            found.append(UserError("mix.dare", what, "name the seed, and mix it too"))
        if self.ties is not None and self.seed_model not in labels:
            what = f"there is no model {self.seed_model} to compare with"
            found.append(UserError("mix.ties", what, "name the seed, and mix it too"))
        if self.dare is not None and self.ties is not None:
            found.append(UserError("mix.ties", BOTH, "choose one"))
        return found


def _moved(model: Expression, base: Expression) -> Expression:
    return WeightedSum((model, base), (1.0, -1.0), 1.0, torch.float64)


UNIFORM = Averaging()
"""The paper's."""


def mean_of(models: Sequence[Checkpoint], dtype: torch.dtype) -> Plan:
    """The plan of the plain mean of checkpoints of one model, dense or MoE: a run's last ones."""
    architecture = models[0].architecture
    expected = canonical_tensors(architecture)
    return Plan(
        architecture=architecture,
        targets={name: mean([one.tensors[name] for one in models], dtype) for name in expected},
        sources={one.label: one.source for one in models},
        expected=expected,
    )


def average(
    models: Sequence[Checkpoint], *, dtype: torch.dtype, averaging: Averaging = UNIFORM
) -> Plan:
    """The plan of a dense model whose every tensor is the average of the models'.

    Raises:
        UserErrors: everything in which the models differ but must not.
    """
    errors = disagreements(models) + averaging.errors(models, GROUPS)
    if errors:
        raise UserErrors(errors)
    architecture = models[0].architecture
    expected = canonical_tensors(architecture)
    return Plan(
        architecture=architecture,
        targets={name: averaging.of(name, models, dtype) for name in expected},
        sources=averaging.sources(models, GROUPS),
        expected=expected,
    )
