"""Training stages of a recipe by name (``seed``, ``expert:<domain>``, ``finetune``, ``dense``) and
what each of them reads, so that what is compared is matched (section 4.1.2 of the paper)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_btx.errors import UserError
from megatron_btx.recipe import count
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
    if is_data_matched(recipe, name):
        return replace(block, tokens=data_matched_tokens(recipe))
    if name == "finetune" and recipe.match == "compute":
        return replace(block, tokens=compute_matched_tokens(recipe))
    return block


def is_data_matched(recipe: Recipe, name: str) -> bool:
    """Whether a stage reads what all others are trained on after the seed, in the same order: the
    dense baseline, and sparse upcycling where it is matched in data."""
    upcycled = name == "finetune" and recipe.system == "upcycling" and recipe.match == "data"
    return name == "dense" or upcycled


def reads(recipe: Recipe, name: str) -> tuple[tuple[MixturePart, ...], ...]:
    """What a stage reads: groups one after the other, the parts of a group interleaved in
    proportion to their samples. Parts without tokens are left out.

    Data-matched (section 4.1.2): first the very samples of all the experts, then the finetuning's
    in its order. Compute-matched: the finetuning's mixture throughout.
    """
    if not is_data_matched(recipe, name):
        return ((MixturePart(stage=name, block=training(recipe, name)),),)
    experts = tuple(
        MixturePart(stage=expert_stage(domain), block=block)
        for domain, block in recipe.experts.items()
        if block.tokens
    )
    finetune = (
        (MixturePart(stage="finetune", block=recipe.finetune),) if recipe.finetune.tokens else ()
    )
    return tuple(group for group in (experts, finetune) if group)


def data_matched_tokens(recipe: Recipe) -> int:
    """All tokens of experts and finetuning, those really trained on: whole steps of each."""
    blocks = [*recipe.experts.values(), recipe.finetune]
    return sum(count.trained_tokens(block, recipe.model) for block in blocks)


def compute_matched_tokens(recipe: Recipe) -> int:
    """Tokens of the finetuning for which the system costs what Branch-Train-MiX with top-2 routing
    does in training FLOPs (count.py), to the nearest step. The paper matches sparse upcycling by
    GPU-days (table 3), and gives Sample Top-1 twice the tokens of top-2 (section 4.1.2)."""
    step = recipe.finetune.global_batch_size * recipe.model.seq_length
    left = btx_flops(recipe) - _before_finetuning(recipe)
    return max(1, round(left / _flops_per_step(recipe))) * step


def mismatch(recipe: Recipe) -> float:
    """By what share whole steps of the finetuning miss the FLOPs that they are matched to."""
    steps = compute_matched_tokens(recipe) // (
        recipe.finetune.global_batch_size * recipe.model.seq_length
    )
    flops = _before_finetuning(recipe) + steps * _flops_per_step(recipe)
    return abs(flops / btx_flops(recipe) - 1)


def btx_flops(recipe: Recipe) -> int:
    """Training FLOPs of Branch-Train-MiX as the paper's defaults have it, whatever system the
    recipe is: all its experts, and the top-2 finetuning of them and the seed."""
    dense = count.dense_architecture(recipe)
    mixed = dense.mixture((*recipe.experts, "seed"), Mix(), Routing())
    tokens = count.trained_tokens(recipe.finetune, recipe.model)
    return _expert_flops(recipe) + tokens * count.training_flops_per_token(mixed)


def _before_finetuning(recipe: Recipe) -> int:
    """FLOPs of the system's own stages between seed and finetuning."""
    return 0 if recipe.system == "upcycling" else _expert_flops(recipe)


def _expert_flops(recipe: Recipe) -> int:
    tokens = sum(count.trained_tokens(e, recipe.model) for e in recipe.experts.values())
    return tokens * count.training_flops_per_token(count.dense_architecture(recipe))


def _flops_per_step(recipe: Recipe) -> int:
    mixed = count.dense_architecture(recipe).mixed(recipe)
    tokens = recipe.finetune.global_batch_size * recipe.model.seq_length
    return tokens * count.training_flops_per_token(mixed, recipe.finetune.freeze_experts)


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
