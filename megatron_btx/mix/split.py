"""Splitting and blending experts (arXiv 2403.07816, section 3.3, "Splitting Experts" and "Blending
Experts"): more experts than models, and experts that hold equal parts of all models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.mix.average import UNIFORM, Averaging
from megatron_btx.mix.compatibility import disagreements, labels_of
from megatron_btx.mix.parts import chunk, joined, moe_targets
from megatron_btx.mix.router_init import NORMAL, RouterInit
from megatron_btx.recipe.names import canonical_tensors
from megatron_btx.recipe.schema import Mix, Routing
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.ops import scaled
from megatron_btx.weights.plan import Checkpoint, Plan


def split(
    models: Sequence[Checkpoint],
    *,
    num_chunks: int,
    routing: Routing,
    dtype: torch.dtype,
    router: RouterInit = NORMAL,
    averaging: Averaging = UNIFORM,
    scale: Literal["down", "none"] = "down",
) -> Plan:
    """The plan of an MoE of ``len(models) * num_chunks`` experts, each a part of an FFN.

    Args:
        models: dense models of one shape; expert ``m * C + c`` is chunk ``c`` of model ``m``.
        num_chunks: C, the parts of each FFN.
        routing: how the MoE will route.
        dtype: of the result.
        router: how the routers are drawn.
        averaging: of all that is no FFN.
        scale: ``down``: down matrices times C, so that the chunks of one FFN under gates of 1/C
            equal it. ``none``: as they are, the paper's silence.

    Raises:
        UserErrors: models that differ, or an FFN that cannot be cut so.
    """
    _check(models, num_chunks, averaging)
    mix = Mix(method="split", num_chunks=num_chunks)
    architecture = models[0].architecture.mixture(labels_of(models), mix, routing)
    tensors = [model.tensors for model in models]

    def ffn(name: str, expert: int) -> Expression:
        own = chunk(name, tensors[expert // num_chunks][name], expert % num_chunks, num_chunks)
        if scale == "down" and name.endswith("linear_fc2.weight"):
            own = scaled(own, num_chunks)
        return own.to(dtype)

    return Plan(
        architecture=architecture,
        targets=moe_targets(
            architecture,
            ffn=ffn,
            router=lambda name, shape: router.draw(name, shape, dtype),
            rest=lambda name: averaging.of(name, models, dtype),
        ),
        sources=averaging.sources(models),
        expected=canonical_tensors(architecture),
    )


def blend(
    models: Sequence[Checkpoint],
    *,
    routing: Routing,
    dtype: torch.dtype,
    router: RouterInit = NORMAL,
    averaging: Averaging = UNIFORM,
) -> Plan:
    """The plan of an MoE of N experts, expert n being the n-th of N chunks of every model.

    Unscaled: of N equal models, expert n is chunk n N times over; gates of 1/N make that chunk n
    once, and the sum over all experts the FFN.

    Raises:
        UserErrors: models that differ, or an FFN that cannot be cut so.
    """
    count = len(models)
    _check(models, count, averaging, blend=True)
    mix = Mix(method="blend")
    architecture = models[0].architecture.mixture(labels_of(models), mix, routing)
    tensors = [model.tensors for model in models]
    return Plan(
        architecture=architecture,
        targets=moe_targets(
            architecture,
            ffn=lambda name, expert: joined(
                name, [chunk(name, each[name], expert, count) for each in tensors]
            ).to(dtype),
            router=lambda name, shape: router.draw(name, shape, dtype),
            rest=lambda name: averaging.of(name, models, dtype),
        ),
        sources=averaging.sources(models),
        expected=canonical_tensors(architecture),
    )


def _check(
    models: Sequence[Checkpoint], chunks: int, averaging: Averaging, *, blend: bool = False
) -> None:
    errors = disagreements(models) + averaging.errors(models)
    size = models[0].architecture.model.ffn_hidden_size
    if size % chunks:
        what = f"an FFN of {size} does not divide into {chunks} chunks"
        blended = "blend cuts it into as many as there are models: mix another number of them"
        errors.append(UserError("mix.num_chunks", what, blended if blend else "choose a divisor"))
    if errors:
        raise UserErrors(errors)
