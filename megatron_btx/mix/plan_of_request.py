"""What ``btx mix`` is asked for: its sources opened, and the plan."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch

from megatron_btx.errors import UserError, UserErrors, collect_errors
from megatron_btx.families.open import open_checkpoint
from megatron_btx.files import named_path
from megatron_btx.mix.align_vocab import align_vocab
from megatron_btx.mix.anchored import own_expert
from megatron_btx.mix.average import average
from megatron_btx.mix.btx import btx
from megatron_btx.mix.compatibility import disagreements, labels_of, with_tokenizer
from megatron_btx.mix.edit_experts import append, drop, replace_expert
from megatron_btx.mix.one_model import copy
from megatron_btx.mix.plan_of_recipe import averaging_of, mix_plan, router_of
from megatron_btx.mix.request import MixRequest
from megatron_btx.recipe.check_mix import misplaced, weights
from megatron_btx.recipe.schema import Mix, Routing
from megatron_btx.weights.find_checkpoint import name_of
from megatron_btx.weights.plan import Checkpoint, Plan

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def open_sources(request: MixRequest) -> tuple[MixRequest, list[Checkpoint]]:
    """Open every source; all that is wrong with any of them at once. The request comes back with
    what the sources decide: under ``align_vocab`` whose tokenizer the result gets."""
    models: list[Checkpoint] = []
    errors: list[UserError] = []
    for source in request.sources:
        label, path = named_path(source)
        with collect_errors(errors):
            label = label or name_of(path)
            models.append(open_checkpoint(path, label, request.model))
    if not errors and request.align_vocab:
        if request.tokenizer:
            what = "is the source of the most tokens under --align-vocab"
            raise UserError("--tokenizer", what, "leave one of the two out")
        models, most = align_vocab(models, request.seed_model)
        request = dataclasses.replace(request, tokenizer=most)
    if not errors:
        models = with_tokenizer(models, request.tokenizer)
    if errors and models and request.method not in ("append", "replace"):
        errors += disagreements([own_expert(model) for model in models])
    if errors:
        raise UserErrors(errors)
    return request, models


def plan_of(request: MixRequest, models: list[Checkpoint]) -> Plan:
    """The plan that a request asks for.

    Raises:
        UserErrors: everything that is wrong with the request and the models, at once.
    """
    dtype = DTYPES[request.dtype] if request.dtype else _common_dtype(models)
    single = {"upcycle": 1, "drop": 1, "copy": 1, "append": 2, "replace": 2}
    wanted = single.get(request.method)
    if wanted is not None and len(models) != wanted:
        what = f"{request.method} takes {wanted} source{'s'[: wanted - 1]}, not {len(models)}"
        raise UserError("--sources", what, "see btx mix --help")
    mix = mix_of(request)
    if wrong := list(misplaced(mix, request.method)):
        raise UserErrors(
            [UserError("--" + n.replace("_", "-"), what, fix) for n, what, fix in wrong]
        )
    if request.base:
        return _of_base(request, mix, models, dtype)
    match request.method:
        case "average":
            averaging = averaging_of(mix, request.random_seed, request.seed_model)
            return average(models, dtype=dtype, averaging=averaging)
        case "append":
            return append(*models, dtype=dtype, router=router_of(mix, request.random_seed))
        case "drop":
            return drop(models[0], request.expert, dtype=dtype)
        case "replace":
            moe, model = models
            return replace_expert(moe, model, request.expert or model.label, dtype=dtype)
        case "copy":
            return copy(models[0], dtype=dtype)
    return mix_plan(
        models,
        mix=mix,
        routing=Routing(type="topk", moe_router_topk=request.moe_router_topk),
        dtype=dtype,
        random_seed=request.random_seed,
        seed_model=request.seed_model,
    )


def _of_base(request: MixRequest, mix: Mix, models: list[Checkpoint], dtype: torch.dtype) -> Plan:
    """Experts beside a model that gives all else."""
    if request.base not in (labels := labels_of(models)):
        raise UserError("--base", f"there is no source {request.base}", f"one of {labels}")
    told = [name for name in _AVERAGES if getattr(request, name) != getattr(MixRequest(), name)]
    if request.method != "btx" or told:
        what = f"goes with method btx alone, not with {', '.join(told) or request.method}"
        raise UserError("--base", what, "all that is no expert is copied from it")
    experts = [model for model in models if model.label != request.base]
    (base,) = (model for model in models if model.label == request.base)
    k = request.moe_router_topk
    if k > len(experts):
        what = f"a token cannot take {k} of {len(experts)} experts"
        raise UserError("--moe-router-topk", what, f"choose at most {len(experts)}")
    routing = Routing(type="topk", moe_router_topk=k)
    router = router_of(mix, request.random_seed)
    return btx(experts, routing=routing, dtype=dtype, router=router, base=base)


_AVERAGES = ("average", "average_groups", "dare", "ties", "fold_norms")


def _same() -> set[str]:
    """Names that ``Mix`` and a request have in common."""
    mix, asked = dataclasses.fields(Mix), dataclasses.fields(MixRequest)
    return {one.name for one in mix} & {one.name for one in asked}


def mix_of(request: MixRequest) -> Mix:
    """A request's part that a recipe has too."""
    options: dict[str, Any] = {name: getattr(request, name) for name in _same()}
    if request.method in ("average", "append", "drop", "replace", "copy"):
        options["method"] = "btx"
    options["average"] = _weights(request.average)
    groups: dict[str, tuple[str, ...]] = {}
    for entry in request.average_groups:
        group, _, weight = entry.partition(":")
        groups[group] = (*groups.get(group, ()), weight)
    options["average_groups"] = {
        group: _by_name("--average-groups", entries) for group, entries in groups.items()
    }
    return Mix(**options)


def _weights(given: tuple[str, ...]) -> Literal["uniform", "tokens"] | dict[str, float]:
    if given in ((), ("uniform",)):
        return "uniform"
    return "tokens" if given == ("tokens",) else _by_name("--average", given)


def _by_name(flag: str, given: tuple[str, ...]) -> dict[str, float]:
    try:
        pairs = [entry.rsplit("=", 1) for entry in given]
        found = {name: float(weight) for name, weight in pairs}
        if len(found) < len(pairs) or not all(map(math.isfinite, found.values())):
            raise ValueError
    except ValueError:
        what = f"{' '.join(given)} is not NAME=WEIGHT ..., each name once"
        raise UserError(flag, what, "write code=2 math=1") from None
    if wrong := list(weights(flag, found, found, "model")):
        raise UserErrors([UserError(*one) for one in wrong])
    return found


def _common_dtype(models: list[Checkpoint]) -> torch.dtype:
    dtypes = {dtype for model in models for _, dtype in model.source.tensors.values()}
    if len(dtypes) != 1:
        what = f"the sources have several dtypes: {', '.join(sorted(map(str, dtypes)))}"
        raise UserError("--dtype", what, "say which the result shall have")
    return dtypes.pop()
