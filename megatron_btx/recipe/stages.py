"""Training stages of a recipe by name (``seed``, ``expert:<domain>``, ``finetune``, ``dense``) and
what each of them reads, so that what is compared is matched (section 4.1.2 of the paper)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_btx.errors import UserError
from megatron_btx.recipe import count, freezing
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Mix, Recipe, Routing, Training


@dataclass(frozen=True, kw_only=True, slots=True)
class MixturePart:
    """One mixture from its first sample to its last."""

    stage: str
    """The stage that it was made for: its shuffles are seeded by this name, so that another stage
    that reads it reads the very same samples."""
    block: Training
    """Its tokens, batch and mixture."""


def training(recipe: Recipe, name: str) -> Training:
    """The settings of a training stage; what is matched to other stages has its tokens from them.

    Raises:
        UserError: the recipe has no such stage.
    """
    block = _block(recipe, name)
    tokens = matched_tokens(recipe).get(name) if block.from_ is None else None
    return block if tokens is None else replace(block, tokens=tokens)


def matched_tokens(recipe: Recipe) -> dict[str, int]:
    """Tokens of the stages whose own block does not say them, by name: of the dense baseline, and
    of those by which a system is matched to the others (``match``)."""
    if recipe.match == "compute":
        return _compute_matched(recipe)
    tokens = data_matched_tokens(recipe)
    found = {} if recipe.dense is None else {"dense": tokens}
    return found | ({"finetune": tokens} if recipe.system == "upcycling" else {})


def reads_all(recipe: Recipe, name: str) -> bool:
    """Whether a stage reads what all others are trained on after the seed, in the same order: the
    dense baseline, and sparse upcycling where it is matched in data."""
    upcycled = name == "finetune" and recipe.system == "upcycling" and recipe.match == "data"
    return name == "dense" or upcycled


def reads(recipe: Recipe, name: str) -> tuple[tuple[MixturePart, ...], ...]:
    """What a stage reads: groups one after the other, the parts of a group interleaved in
    proportion to their samples. Parts without tokens are left out.

    Data-matched (section 4.1.2): first the very samples of all the experts, then the finetuning's
    in its order. Compute-matched: the finetuning's mixture throughout; of the dense baseline it
    lasts longer, behind the experts' samples.
    """
    if not reads_all(recipe, name):
        return ((MixturePart(stage=name, block=training(recipe, name)),),)
    experts = tuple(
        MixturePart(stage=expert_stage(domain), block=block)
        for domain, block in recipe.experts.items()
        if block.tokens
    )
    last = recipe.finetune
    if recipe.match == "compute":
        last = replace(last, tokens=training(recipe, name).tokens - _expert_tokens(recipe))
    finetune = (MixturePart(stage="finetune", block=last),) if last.tokens > 0 else ()
    return tuple(group for group in (experts, finetune) if group)


def data_matched_tokens(recipe: Recipe) -> int:
    """All tokens of experts and finetuning, those really trained on: whole steps of each."""
    return _expert_tokens(recipe) + count.trained_tokens(recipe.finetune, recipe.model)


def btx_flops(recipe: Recipe) -> int:
    """Training FLOPs of Branch-Train-MiX as the paper's defaults have it, whatever system the
    recipe is: all its experts, and the top-2 finetuning of them and the seed."""
    dense = count.dense_architecture(recipe)
    mixed = dense.mixture((*recipe.experts, "seed"), Mix(), Routing())
    experts = _expert_tokens(recipe) * count.training_flops_per_token(dense)
    tokens = count.trained_tokens(recipe.finetune, recipe.model)
    return experts + tokens * count.training_flops_per_token(mixed)


def architecture(recipe: Recipe, name: str) -> Architecture:
    """The model that a stage trains, with the vocabulary that the recipe states."""
    dense = count.dense_architecture(recipe)
    if name == "finetune":
        return dense.mixed(recipe)
    expert = recipe.experts.get(name.removeprefix("expert:")) if ":" in name else None
    if expert is not None and expert.anchor is not None:
        return dense.anchored(name.removeprefix("expert:"), recipe.routing)
    return dense


def flops(recipe: Recipe, name: str) -> int:
    """Training FLOPs of a stage (count.py)."""
    return _flops(recipe, name, training(recipe, name))


def mismatches(recipe: Recipe) -> dict[str, float]:
    """By what share whole steps miss the FLOPs that a system is matched to, by the stage whose
    tokens are derived; of several experts they miss it together."""
    wanted, tokens = btx_flops(recipe), _compute_matched(recipe)
    found: dict[str, float] = {}
    if "dense" in tokens:
        found["dense"] = abs(flops(recipe, "dense") / wanted - 1)
    if "finetune" in tokens:
        found["finetune"] = abs((_own_flops(recipe) + flops(recipe, "finetune")) / wanted - 1)
    extended = [name for name in tokens if name not in found]
    if extended:
        every = sum(flops(recipe, expert_stage(domain)) for domain in recipe.experts)
        found[extended[0]] = abs(every / wanted - 1)
    return found


def _compute_matched(recipe: Recipe) -> dict[str, int]:
    """Tokens for which a system costs what Branch-Train-MiX with top-2 routing does in training
    FLOPs (count.py), to the nearest step. The paper matches sparse upcycling by GPU-days (table 3),
    and gives Sample Top-1 twice the tokens of top-2 (section 4.1.2). Without a finetuning the
    experts get more, each by the same factor."""
    wanted = btx_flops(recipe)
    found: dict[str, int] = {}
    if recipe.dense is not None:
        found["dense"] = _tokens_for(recipe, "dense", recipe.dense, wanted)
    if recipe.system in ("upcycling", "btx"):
        left = wanted - _own_flops(recipe)
        found["finetune"] = _tokens_for(recipe, "finetune", recipe.finetune, left)
    elif recipe.system in ("btm", "experts"):
        own = {expert_stage(name): block for name, block in recipe.experts.items()}
        cost = {name: _flops(recipe, name, block) for name, block in own.items()}
        # What is taken, or is the seed, cannot be given more; the others make up for it.
        longer = [name for name, e in own.items() if e.from_ is None and e.tokens > 0]
        left = wanted - sum(cost[name] for name in cost.keys() - longer)
        whole = sum(cost[name] for name in longer)
        for name in longer:
            found[name] = _tokens_for(recipe, name, own[name], left * cost[name] // whole)
    return found


def _tokens_for(recipe: Recipe, name: str, block: Training, flops: int) -> int:
    steps = freezing.steps_for(architecture(recipe, name), block, recipe.model, flops)
    return steps * block.global_batch_size * recipe.model.seq_length


def _own_flops(recipe: Recipe) -> int:
    """FLOPs of the system's own stages between seed and finetuning."""
    if recipe.system == "upcycling":
        return 0
    blocks = recipe.experts.items()
    return sum(_flops(recipe, expert_stage(name), block) for name, block in blocks)


def _flops(recipe: Recipe, name: str, block: Training) -> int:
    return freezing.stage_flops(architecture(recipe, name), block, recipe.model)


def _expert_tokens(recipe: Recipe) -> int:
    return sum(count.trained_tokens(e, recipe.model) for e in recipe.experts.values())


def boundaries(recipe: Recipe) -> tuple[bool, bool]:
    """``reset_attention_mask`` and ``eod_mask_loss``: those of all stages are alike (check.py)."""
    return recipe.finetune.reset_attention_mask, recipe.finetune.eod_mask_loss


def expert_stage(domain: str) -> str:
    """The name of an expert's stage."""
    return f"expert:{domain}"


def model_stage(model: str) -> str:
    """The stage that trains a model of the mix: an expert by its domain's name, or ``seed``."""
    return model if model == "seed" else expert_stage(model)


def recipe_key(stage: str) -> str:
    """The key of a stage's block in a recipe: ``expert:math`` is ``experts.math``."""
    kind, colon, domain = stage.partition(":")
    return f"experts.{domain}" if colon and kind == "expert" else stage


def stage_of_key(key: str) -> str:
    """The stage of a recipe's block: the inverse of :func:`recipe_key`."""
    block, dot, domain = key.partition(".")
    return expert_stage(domain) if dot and block == "experts" else key


def directory(run_dir: Path, name: str) -> Path:
    """Where a stage writes."""
    return run_dir / name.replace(":", "-")


def _block(recipe: Recipe, name: str) -> Training:
    """As the recipe states it."""
    blocks = {
        "seed": recipe.seed,
        "finetune": recipe.finetune,
        **{expert_stage(domain): block for domain, block in recipe.experts.items()},
    }
    if recipe.dense is not None:
        blocks["dense"] = recipe.dense
    if name not in blocks:
        raise UserError(name, "is no training stage of this recipe", f"choose {', '.join(blocks)}")
    return blocks[name]


def taken(recipe: Recipe) -> dict[str, str]:
    """The directory of each model that is taken, not trained: ``seed`` and domains."""
    seed = recipe.seed.from_
    found = {"seed": seed}
    for name, expert in recipe.experts.items():
        found[name] = seed if expert.from_ is None and expert.tokens == 0 else expert.from_
    return {name: path for name, path in found.items() if path is not None}


def imported(recipe: Recipe, name: str) -> str | None:
    """Where the model of stage ``name`` is taken from instead of being trained: a checkpoint
    directory, the name of another stage (an expert of zero tokens is the seed), or nowhere."""
    block = _block(recipe, name)
    if block.from_ is not None:
        return block.from_
    return "seed" if name.startswith("expert:") and block.tokens == 0 else None
