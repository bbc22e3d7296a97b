"""What a recipe's ``mix:`` must fulfil: which options go with which method, and which weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from megatron_btx.recipe.check_layout import Problem
from megatron_btx.recipe.messages import near_key
from megatron_btx.recipe.schema import Mix, Recipe

GROUPS = ("embeddings", "attention", "norms", "ffn", "head")
"""Kinds of tensors, as drift reports them."""
AVERAGED = tuple(group for group in GROUPS if group != "ffn")
"""Those that may be averaged differently."""

FROM_FILE = ("centroids", "ridge")
"""Router initialisations whose rows are read from a file of ``btx centroids``."""

_BORN = ("btx", "split", "blend", "upcycle", "append")
_AVERAGING = ("btx", "split", "blend", "average")
_NEEDS: dict[str, tuple[str, ...]] = {
    "copies": ("upcycle",),
    "num_chunks": ("split", "upcycle"),
    "scale": ("split", "upcycle"),
    "average": _AVERAGING,
    "average_groups": _AVERAGING,
    "dare": _AVERAGING,
    "ties": _AVERAGING,
    "fold_norms": ("btx",),
    "noise": ("upcycle",),
    "drop_ratio": ("upcycle",),
    "router_init": _BORN,
    "router_init_std": _BORN,
    "centroids": ("btx",),
}
"""The methods that look at an option; with any other it must be left at its default."""


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Everything wrong with ``mix:``."""
    mix, models = recipe.mix, recipe.model_names
    for name, what, fix in misplaced(mix, mix.method):
        yield Problem(f"mix.{name}", what, fix)
    yield from _averages(mix, models)
    yield from _chunks(recipe)
    if mix.align_vocab and recipe.seed.from_ is None:
        what = "is about the vocabularies of models that are taken, and the seed is trained here"
        yield Problem("mix.align_vocab", what, "give `seed: {from: DIR}`, or leave it out")
    if mix.align_vocab and recipe.tokenizer.path is not None:
        what = "stands beside mix.align_vocab, by which the run gets that of the most tokens"
        yield Problem("tokenizer.path", what, "leave one of the two out")
    if mix.centroids is not None and mix.router_init not in FROM_FILE:
        fix = "give the `router_init` that the file was made for, or remove it"
        yield Problem("mix.centroids", "goes with router_init: centroids or ridge", fix)
    plain = [name for name, expert in recipe.experts.items() if expert.anchor is None]
    if mix.router_init == "branches" and plain:
        what = (
            f"is branches, and {', '.join(plain)} is none"
            if len(plain) == 1
            else (f"is branches, and {', '.join(plain)} are none")
        )
        yield Problem("mix.router_init", what, "give each `anchor: seed`, or choose another")
    if mix.router_init in FROM_FILE and mix.method != "btx":
        what = f"{mix.router_init} needs experts that have domains, those of {mix.method} have none"
        yield Problem("mix.router_init", what, "use method btx, or another router_init")


def misplaced(mix: Mix, method: str) -> Iterator[tuple[str, str, str]]:
    """Options that ``method`` (of a recipe or of ``btx mix``) does not look at: name, what, fix."""
    default = Mix()
    for name, methods in _NEEDS.items():
        if method not in methods and getattr(mix, name) != getattr(default, name):
            what = f"has no meaning for method {method}"
            yield name, what, f"leave it out, or use method {' or '.join(methods)}"
    if mix.dare is not None and mix.ties is not None and method in _AVERAGING:
        yield "ties", BOTH, "choose one"


BOTH = "stands beside dare, and each is a way to average by itself"
"""What is wrong with TIES together with DARE."""


def cut_groups(mix: Mix, k: int) -> Iterator[tuple[str, str]]:
    """Whether top-k takes whole virtual groups of a granular upcycled model: what is wrong, fix."""
    if mix.method == "upcycle" and mix.chunks > 1 and k % mix.chunks:
        what = f"top-{k} of virtual groups of {mix.chunks} chunks takes part of a group"
        yield what, f"use a multiple of {mix.chunks}"


def _averages(mix: Mix, models: tuple[str, ...]) -> Iterator[Problem]:
    given = mix.average_groups
    for name in given.keys() - {*AVERAGED}:
        fix = f"known: {', '.join(AVERAGED)}{near_key(name, AVERAGED)}"
        yield Problem(f"mix.average_groups.{name}", "is nothing that is averaged", fix)
    keys = {f"mix.average_groups.{name}": each for name, each in given.items()}
    if isinstance(mix.average, dict):
        keys["mix.average"] = mix.average
    for key, each in keys.items():
        yield from weights(key, each, models, "model")
        for name in set(models) - set(each):
            yield Problem(key, f"gives {name} no weight", f"add `{name}:` (0 is a weight)")
    if mix.average == "tokens" and set(models) == {"seed"}:
        what = "the seed has been trained on nothing since itself"
        yield Problem("mix.average", what, "use uniform")
    for name in ("dare", "ties"):
        if getattr(mix, name) is not None and "seed" not in models:
            what = "is about differences from the seed, which is not mixed"
            yield Problem(f"mix.{name}", what, "set include_seed, or remove it")


def _chunks(recipe: Recipe) -> Iterator[Problem]:
    mix, ffn = recipe.mix, recipe.model.ffn_hidden_size
    if mix.scale == "cube_root" and mix.method == "split":
        yield Problem("mix.scale", "cube_root is a rule for upcycling", "choose down or none")
    count = len(recipe.model_names) if mix.method == "blend" else mix.chunks
    if ffn % count:
        what = f"an FFN of {ffn} does not divide into {count} parts"
        yield Problem("mix.num_chunks", what, "choose a divisor of model.ffn_hidden_size")
    if recipe.routing.type == "topk":
        for what, fix in cut_groups(mix, recipe.routing.moe_router_topk):
            yield Problem("routing.moe_router_topk", what, fix)


def weights(
    key: str, given: Mapping[str, float], names: Iterable[str], kind: str
) -> Iterator[Problem]:
    """Weights by name: each of a known ``kind``, none negative, not all zero."""
    names = list(names)
    for name, weight in given.items():
        if name not in names:
            known = f"known: {', '.join(names)}{near_key(name, names)}"
            yield Problem(f"{key}.{name}", f"there is no {kind} {name}", known)
        elif weight < 0:
            yield Problem(f"{key}.{name}", f"the weight {weight} is negative", "give 0 or more")
        elif weight > 1e9 or 0 < weight < 1e-9:  # products with these lose digits
            size = "large" if weight > 1 else "small"
            yield Problem(f"{key}.{name}", f"the weight {weight} is too {size}", "give shares")
    if given and not any(weight > 0 for weight in given.values()):
        yield Problem(key, "every weight is zero", "give at least one a positive weight")
