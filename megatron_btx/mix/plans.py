"""The plan of every mix: of the MoE that a recipe asks for (:func:`mix_plan`), and of what a ``btx
mix`` request asks for (:func:`plan_of`), its sources opened."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from megatron_btx.errors import UserError, UserErrors, collect_errors
from megatron_btx.families.open_checkpoint import open_checkpoint
from megatron_btx.files import named_word
from megatron_btx.mix.align_vocab import align_vocab
from megatron_btx.mix.anchored import own_expert
from megatron_btx.mix.average import Averaging, Dare, average
from megatron_btx.mix.btx import btx
from megatron_btx.mix.compatibility import disagreements, labels_of, with_tokenizer
from megatron_btx.mix.edit_experts import append, drop, replace_expert
from megatron_btx.mix.one_model import copy
from megatron_btx.mix.request import MixRequest
from megatron_btx.mix.router_init import RouterInit, check_rows
from megatron_btx.mix.split import blend, split
from megatron_btx.mix.upcycle import upcycle
from megatron_btx.recipe.check_mix import FROM_FILE, cut_groups, misplaced, weights
from megatron_btx.recipe.messages import flag_of
from megatron_btx.recipe.schema import Mix, Model, Routing
from megatron_btx.weights.find_checkpoint import name_of
from megatron_btx.weights.plan import Checkpoint, Plan
from megatron_btx.weights.safetensors import SafetensorsSource
from megatron_btx.weights.source import Source

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
        raise UserError("routing.moe_router_topk", what, f"choose at most {len(experts)}")
    new: dict[str, Any] = {
        "routing": routing,
        "dtype": dtype,
        "router": router
        or router_of(mix, random_seed, seed_model, experts, models[0].architecture.model),
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


def router_of(
    mix: Mix, random_seed: int, seed_model: str, experts: Sequence[str], model: Model
) -> RouterInit:
    """How ``mix`` makes the routers of these experts of a model.

    Raises:
        UserErrors: the file of centroids is missing or damaged, or of another kind, or of other
            experts or another model.
    """
    _check_router_file(mix)
    if mix.centroids is None:
        init = RouterInit(mix.router_init, mix.router_init_std, random_seed)
        return replace(init, seed_model=seed_model)
    rows = SafetensorsSource(mix.centroids)
    check_rows(rows, mix.centroids, experts, model)
    with safe_open(mix.centroids, "pt") as file:
        kind = (file.metadata() or {}).get("router_init", "centroids")
    if kind != mix.router_init:
        what = f"holds router rows of {kind}, and router_init is {mix.router_init}"
        raise UserError(mix.centroids, what, f"choose {kind}, or give a file of {mix.router_init}")
    return RouterInit(mix.router_init, mix.router_init_std, random_seed, rows)


def _check_router_file(mix: Mix) -> None:
    if (mix.router_init in FROM_FILE) == (mix.centroids is not None):
        return
    if mix.centroids is None:
        what = f"is {mix.router_init}, and needs the file that `btx centroids` writes"
        raise UserError("mix.router_init", what, "give it: --centroids FILE")
    what = f"is not used where the routers begin by {mix.router_init}"
    fix = f"begin them by {' or '.join(FROM_FILE)}, or leave the file out"
    raise UserError("mix.centroids", what, fix)


def averaging_of(mix: Mix, random_seed: int, seed_model: str = SEED) -> Averaging:
    """How ``mix`` averages."""
    return Averaging(
        weights=None if mix.average == "uniform" else mix.average,
        groups=mix.average_groups,
        dare=None if mix.dare is None else Dare(seed_model, mix.dare, random_seed),
        seed_model=seed_model,
        ties=mix.ties,
    )


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


_FIRST_MAY_BE_MOE = ("append", "drop", "replace", "copy")
"""Methods whose first source is a mixture, or may be one; all other sources are dense."""


def open_sources(request: MixRequest) -> tuple[MixRequest, list[Checkpoint]]:
    """Open every source; all that is wrong with any of them at once. The request comes back with
    what the sources decide: under ``align_vocab`` whose tokenizer the result gets."""
    models: list[Checkpoint] = []
    errors: list[UserError] = []
    for at, source in enumerate(request.sources):
        label, given = named_word(source)
        dense = at > 0 or request.method not in _FIRST_MAY_BE_MOE
        with collect_errors(errors):
            label = label or name_of(Path(given))
            models.append(open_checkpoint(given, label, request.model, dense=dense))
    if not errors and request.align_vocab:
        aligned, most = align_vocab(models, request.seed_model)
        models = [*aligned]
        request = dataclasses.replace(request, tokenizer=most)
    if not errors:
        models = with_tokenizer(models, request.tokenizer)
    if errors and models and request.method not in ("append", "replace"):
        errors += disagreements([own_expert(model) for model in models])
    if errors:
        raise UserErrors(errors)
    return request, models


def misfits(request: MixRequest) -> list[UserError]:
    """What of a request does not go together, whatever its sources are."""
    errors: list[UserError] = []
    wanted, given = _SOURCES.get(request.method), len(request.sources)
    if request.align_vocab and request.method == "copy":
        wanted = None  # of the first, with the vocabulary of all
    if wanted is not None and given != wanted:
        what = f"{request.method} takes {wanted} source{'s'[: wanted - 1]}, not {given}"
        errors.append(UserError("--sources", what, "see btx mix --help"))
    if request.method == "split" and request.num_chunks == 1:
        what = "is 1, and split cuts each feed-forward layer into that many experts"
        errors.append(UserError("--num-chunks", what, "give 2 or more, or use method btx"))
    if request.method in ("btx", "blend") and given - bool(request.base) == 1:
        what = f"{request.method} makes experts of several models, and there is one"
        fix = "give two or more sources, or --method upcycle"
        errors.append(UserError("--sources", what, fix))
    if request.align_vocab and request.tokenizer:
        what = (
            "cannot be combined with --align-vocab, which takes the tokenizer with the most tokens"
        )
        errors.append(UserError("--tokenizer", what, "remove one of the two"))
    with collect_errors(errors):
        mix = mix_of(request)
        for name, what, fix in (*misplaced(mix, request.method), *_misplaced(request)):
            errors.append(UserError(flag_of(name), what, fix))
        for what, fix in cut_groups(mix, request.moe_router_topk):
            errors.append(UserError("--moe-router-topk", what, fix))
        if request.method not in ("average", "drop", "replace", "copy"):  # which make no router
            _check_router_file(mix)
    return errors


_NEEDS = {
    "moe_router_topk": ("btx", "upcycle", "split", "blend"),
    "expert": ("drop", "replace"),
}
_OF_HF = ("family", "fused")
"""Options of a result in Hugging Face's format."""


def _misplaced(request: MixRequest) -> Iterator[tuple[str, str, str]]:
    """Options of ``btx mix`` alone that its method, or the result's format, does not look at."""
    default = MixRequest()
    given = {one for one in (*_NEEDS, *_OF_HF) if getattr(request, one) != getattr(default, one)}
    for name, methods in _NEEDS.items():
        if name in given and request.method not in methods:
            what = f"has no meaning for method {request.method}"
            yield name, what, f"leave it out, or use method {' or '.join(methods)}"
    for name in _OF_HF:
        if name in given and request.format != "hf":
            what = f"has no meaning for format {request.format}"
            yield name, what, "leave it out, or write format hf"


_RECIPES_KEY = re.compile(r"(?:mix|routing)\.(\w+)(?:\.(.+))?")


def as_flag(key: str) -> str:
    """What errors of ``btx mix`` call an option where the rule is a recipe's: ``--average-groups
    norms`` for ``mix.average_groups.norms``."""
    match = _RECIPES_KEY.fullmatch(key)
    if match is None or match[1] not in {one.name for one in dataclasses.fields(MixRequest)}:
        return key
    return " ".join(filter(None, (flag_of(match[1]), match[2])))


_SOURCES = {"upcycle": 1, "drop": 1, "copy": 1, "append": 2, "replace": 2}
"""How many sources a method takes that does not take any number of them."""


def plan_of(request: MixRequest, models: list[Checkpoint], rows: Source | None = None) -> Plan:
    """The plan that a request asks for, in which nothing is amiss by :func:`misfits`.

    Args:
        request: what.
        models: its sources, opened.
        rows: beside a base, of the routers, in place of those that the request asks for.

    Raises:
        UserErrors: everything that is wrong with the models and what is asked of them.
    """
    dtype = DTYPES[request.dtype] if request.dtype else _common_dtype(models)
    mix = mix_of(request)
    if request.base:
        return _of_base(request, mix, models, dtype, rows)
    match request.method:
        case "average":
            averaging = averaging_of(mix, request.random_seed, request.seed_model)
            return average(models, dtype=dtype, averaging=averaging)
        case "append":
            router = router_of(mix, request.random_seed, SEED, (), models[0].architecture.model)
            return append(*models, dtype=dtype, router=router)
        case "drop":
            return drop(models[0], request.expert, dtype=dtype)
        case "replace":
            moe, model = models
            return replace_expert(moe, model, request.expert or model.label, dtype=dtype)
        case "copy":
            return copy(models[0], dtype=dtype, givers=models[1:])
    return mix_plan(
        models,
        mix=mix,
        routing=Routing(type="topk", moe_router_topk=request.moe_router_topk),
        dtype=dtype,
        random_seed=request.random_seed,
        seed_model=request.seed_model,
    )


def _of_base(
    request: MixRequest,
    mix: Mix,
    models: list[Checkpoint],
    dtype: torch.dtype,
    rows: Source | None,
) -> Plan:
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
    names, model = labels_of(experts), base.architecture.model
    router = router_of(mix, request.random_seed, request.seed_model, names, model)
    if rows is not None:
        router = RouterInit("centroids", centroids=rows)
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
    (dtype,) = dtypes
    if dtype not in DTYPES.values():
        what = f"the sources are {dtype}, which is not an output dtype"
        raise UserError("--dtype", what, f"say which it shall have: {', '.join(DTYPES)}")
    return dtype
