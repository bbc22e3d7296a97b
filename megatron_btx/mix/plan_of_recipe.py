"""One entry to every mix that a recipe or ``btx mix`` can ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open

from megatron_btx.errors import UserError
from megatron_btx.mix.average import Averaging, Dare
from megatron_btx.mix.btx import btx
from megatron_btx.mix.compatibility import labels_of
from megatron_btx.mix.router_init import RouterInit
from megatron_btx.mix.split import blend, split
from megatron_btx.mix.upcycle import upcycle
from megatron_btx.recipe.check_mix import FROM_FILE
from megatron_btx.recipe.schema import Mix, Routing
from megatron_btx.weights.plan import Checkpoint, Plan
from megatron_btx.weights.safetensors import SafetensorsSource

SEED = "seed"
"""What recipes call the model from which the others were branched."""


def mix_plan(
    models: Sequence[Checkpoint],
    *,
    mix: Mix,
    routing: Routing,
    dtype: torch.dtype,
    random_seed: int,
    seed_model: str = SEED,
    router: RouterInit | None = None,
) -> Plan:
    """The plan of the MoE that ``mix`` makes of dense models.

    Args:
        models: opened, in the order of :meth:`Mix.expert_names`; one for ``upcycle``.
        mix: the method, its options, and how the routers are initialised.
        routing: of the MoE.
        dtype: of its weights.
        random_seed: of routers, noise, re-initialisation and DARE.
        seed_model: label of the seed among the models.
        router: how the routers begin, where it is not as ``mix`` says.

    Raises:
        UserErrors: everything in which the models differ but must not, and options that do not fit
            them.
    """
    experts = mix.expert_names(labels_of(models))
    if routing.type == "topk" and routing.moe_router_topk > len(experts):
        what = f"a token cannot take {routing.moe_router_topk} of {len(experts)} experts"
        raise UserError("moe_router_topk", what, f"choose at most {len(experts)}")
    new: dict[str, Any] = {
        "routing": routing,
        "dtype": dtype,
        "router": router or router_of(mix, random_seed, seed_model),
    }
    if mix.method == "upcycle":
        if len(models) != 1:
            what = f"upcycle takes one model, not {len(models)}"
            raise UserError("mix.method", what, "give the seed alone")
        same = ("copies", "num_chunks", "scale", "noise", "drop_ratio")
        return upcycle(models[0], **{name: getattr(mix, name) for name in same}, **new)
    new["averaging"] = averaging_of(mix, random_seed, seed_model)
    if mix.method == "split":
        if mix.scale == "cube_root":
            raise UserError("mix.scale", "cube_root is for upcycle", "choose down or none")
        return split(models, num_chunks=mix.num_chunks, scale=mix.scale, **new)
    if mix.method == "blend":
        return blend(models, **new)
    return btx(models, fold_norms=mix.fold_norms, **new)


def router_of(mix: Mix, random_seed: int, seed_model: str = SEED) -> RouterInit:
    """How ``mix`` makes routers.

    Raises:
        UserErrors: the file of centroids is missing or damaged, or of another kind.
    """
    if (mix.router_init in FROM_FILE) != (mix.centroids is not None):
        fix = f"give `router_init: {' or '.join(FROM_FILE)}` and the file of `btx centroids`"
        raise UserError("mix.centroids", "goes with router_init", f"{fix}, or neither")
    if mix.centroids is None:
        init = RouterInit(mix.router_init, mix.router_init_std, random_seed)
        return replace(init, seed_model=seed_model)
    rows = SafetensorsSource(mix.centroids)
    with safe_open(mix.centroids, "pt") as file:
        kind = (file.metadata() or {}).get("router_init", "centroids")
    if kind != mix.router_init:
        what = f"holds rows of {kind}, not of {mix.router_init}"
        raise UserError(mix.centroids, what, f"set router_init to {kind}, or make the other file")
    return RouterInit(mix.router_init, mix.router_init_std, random_seed, rows)


def averaging_of(mix: Mix, random_seed: int, seed_model: str = SEED) -> Averaging:
    """How ``mix`` averages."""
    return Averaging(
        weights=None if mix.average == "uniform" else mix.average,
        groups=mix.average_groups,
        dare=None if mix.dare is None else Dare(seed_model, mix.dare, random_seed),
        seed_model=seed_model,
        ties=mix.ties,
    )
