"""Anchored branches (FlexOlmo, arXiv 2507.07024; BAR, arXiv 2604.18473).

A branch is an MoE of two experts: the seed's feed-forward layers, which stay as they are while it
is trained (the anchor), and its own, which begin as a copy of them. Branches are put together by
concatenation: seen as the dense model of its own expert, a branch goes into any mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_btx.mix.average import Averaging
from megatron_btx.mix.parts import moe_targets
from megatron_btx.mix.router_init import ANCHOR, NORMAL, OWN, RouterInit
from megatron_btx.recipe.names import DENSE_NORM, MOE_NORM, ROUTER, canonical_tensors
from megatron_btx.recipe.schema import Routing
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.ops import item, stack
from megatron_btx.weights.plan import Checkpoint, Ignore, Plan
from megatron_btx.weights.source import View


def branch(
    seed: Checkpoint,
    name: str,
    *,
    routing: Routing,
    dtype: torch.dtype,
    router: RouterInit = NORMAL,
) -> Plan:
    """The plan of a branch before it is trained: with gates that sum to one it computes what the
    seed does. Every branch's router begins with the same row for the anchor.

    Args:
        seed: the dense model.
        name: of the branch, and of its own expert.
        routing: of the MoE that it will be put into.
        dtype: of its weights.
        router: how its router is drawn, a row at a time.
    """
    architecture = seed.architecture.anchored(name, routing)
    tensors = seed.tensors

    def rows(name: str, shape: tuple[int, ...]) -> Expression:
        drawn = [f"{name}/{expert}" for expert in architecture.experts]
        return stack([router.draw(row, shape[1:], dtype) for row in drawn])

    return Plan(
        architecture=architecture,
        targets=moe_targets(
            architecture,
            ffn=lambda name, _: tensors[name].to(dtype),
            router=rows,
            rest=lambda name: tensors[name].to(dtype),
        ),
        sources={seed.label: seed.source},
        expected=canonical_tensors(architecture),
    )


def is_branch(model: Checkpoint) -> bool:
    """Whether a checkpoint says that it is an anchored branch."""
    return "anchor" in model.manifest and len(model.architecture.experts) == 2


def not_branches(models: Sequence[Checkpoint], seed_model: str) -> list[str]:
    """Labels of the models that are no branches and of which a mix of branches needs one each: all
    but the seed's, which is their anchor, where there is any branch."""
    plain = [model.label for model in models if not is_branch(model)]
    of_some = len(plain) < len(models)
    return [label for label in plain if not (of_some and label == seed_model)]


def own_expert(model: Checkpoint) -> Checkpoint:
    """A branch as the dense model of its own expert, with the two rows of each router beside it
    (``.../own``, ``.../anchor``); any other checkpoint as it is."""
    if not is_branch(model):
        return model
    experts = model.architecture.experts
    anchor = experts.index(model.manifest["anchor"])
    architecture = replace(model.architecture, experts=(), routing=None)
    seen: dict[str, Expression] = {}
    for name in canonical_tensors(architecture):
        there = name.replace(DENSE_NORM, MOE_NORM)
        seen[name] = model.tensors[
            there.replace(".mlp.linear", f".mlp.experts.{1 - anchor}.linear")
        ]
    for name, router in model.tensors.items():
        if name.endswith(ROUTER):
            seen[f"{name}/{OWN}"] = item(router, 1 - anchor)
            seen[f"{name}/{ANCHOR}"] = item(router, anchor)
    return replace(model, architecture=architecture, source=View(model.source, seen))


def weighed(averaging: Averaging, models: Sequence[Checkpoint], seed_model: str) -> Averaging:
    """Uniform means over the branches: the seed is their anchor, not one of them."""
    if averaging.weights is not None or not any(map(is_branch, models)):
        return averaging
    weights = {model.label: float(model.label != seed_model) for model in models}
    return replace(averaging, weights=weights)


def unused_rows(models: Sequence[Checkpoint], router: RouterInit) -> dict[str, tuple[Ignore, ...]]:
    """What of branches a mix need not use: router rows, where its routers are others."""
    if router.kind == "branches":
        return {}
    ignored = (Ignore(rf".*/({OWN}|{ANCHOR})", "a branch's router: the mix has others"),)
    return {model.label: ignored for model in models if is_branch(model)}
