"""Training stages of a recipe by name: ``seed``, ``expert:<domain>``, ``finetune``, ``dense``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_btx.errors import UserError
from megatron_btx.recipe import count
from megatron_btx.recipe.schema import Recipe, Training


def training(recipe: Recipe, name: str) -> Training:
    """The settings of a training stage; the dense baseline's tokens are the other stages'.

    Raises:
        UserError: the recipe has no such stage.
    """
    if name == "dense" and recipe.dense is not None:
        return replace(recipe.dense, tokens=count.dense_tokens(recipe))
    blocks = {
        "seed": recipe.seed,
        "finetune": recipe.finetune,
        **{f"expert:{domain}": block for domain, block in recipe.experts.items()},
    }
    if name not in blocks:
        raise UserError(name, "is no training stage of this recipe", f"choose {', '.join(blocks)}")
    return blocks[name]


def directory(run_dir: Path, name: str) -> Path:
    """Where a stage writes."""
    return run_dir / name.replace(":", "-")
