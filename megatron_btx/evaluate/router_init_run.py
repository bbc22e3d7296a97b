"""Routers of ``router_init: centroids`` and ``ridge`` from a run's own training text, made where
its finetuning begins: without a file, so that every random seed has its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_btx.data.heldout_sequences import HeldOutText
from megatron_btx.data.prepare import train_pairs
from megatron_btx.engine.model import DTYPES
from megatron_btx.errors import UserError
from megatron_btx.evaluate.centroids import SPREAD, routers
from megatron_btx.evaluate.predictor import NO_PROGRESS
from megatron_btx.evaluate.router_init_rows import centroid_rows, ridge_rows
from megatron_btx.mix.plans import mix_plan
from megatron_btx.mix.router_init import RouterInit
from megatron_btx.recipe.schema import Recipe, Training
from megatron_btx.weights.plan import Checkpoint
from megatron_btx.weights.source import MemorySource


def run_routers(
    recipe: Recipe,
    run_dir: Path,
    models: Sequence[Checkpoint],
    training: Training,
    progress: Callable[[float], None] = NO_PROGRESS,
) -> RouterInit:
    """The rows of the mixed model's routers. Every rank of the finetuning calls it.

    Each expert reads ``mix.router_init_tokens`` of its domain, evenly taken from the training text
    of :func:`domain_of`; ``progress`` is told how much of it has been read.

    Raises:
        UserError: a domain has less than one sequence of text.
    """
    mix = recipe.mix
    plain = replace(mix, router_init="zeros")
    plan = mix_plan(
        models,
        mix=plain,
        routing=recipe.routing,
        dtype=DTYPES[training.precision],
        random_seed=recipe.random_seed,
    )
    found = routers(
        plan,
        {name: _text(recipe, run_dir, name) for name in plan.architecture.experts},
        layout=training.layout,
        precision=training.precision,
        rule=ridge_rows if mix.router_init == "ridge" else centroid_rows,
        gram=mix.router_init == "ridge",
        spread=None if mix.router_init == "ridge" else SPREAD,
        micro_batch_size=training.micro_batch_size,
        progress=progress,
    )
    rows = {
        f"decoder.layers.{layer}.mlp.router.weight/{name}": found.rows[layer, expert].contiguous()
        for layer in range(len(found.rows))
        for expert, name in enumerate(plan.architecture.experts)
    }
    return RouterInit(mix.router_init, centroids=MemorySource(rows))


def not_yet(recipe: Recipe, models: Sequence[str]) -> RouterInit:
    """Stands for those rows where a mix is only planned: they are zero."""
    hidden = torch.zeros(recipe.model.hidden_size)
    layers = range(recipe.model.num_layers)
    rows = {
        f"decoder.layers.{layer}.mlp.router.weight/{model}": hidden
        for layer in layers
        for model in models
    }
    return RouterInit(recipe.mix.router_init, centroids=MemorySource(rows))


def domain_of(recipe: Recipe, expert: str) -> str:
    """The domain whose text tells an expert apart: that of which it read the most; for the seed,
    of the domains that are no expert's where it read any."""
    if expert != "seed":
        return _most(recipe.experts[expert].data)
    taken = {_most(block.data) for block in recipe.experts.values() if block.data}
    read = recipe.seed.data or dict.fromkeys(recipe.domains, 1.0)  # of a seed that was taken
    return _most({name: share for name, share in read.items() if name not in taken} or read)


def _most(data: dict[str, float]) -> str:
    return max(data, key=lambda name: data[name])


def _text(recipe: Recipe, run_dir: Path, expert: str) -> HeldOutText:
    domain, tokens = domain_of(recipe, expert), recipe.mix.router_init_tokens
    text = HeldOutText(train_pairs(run_dir, domain), recipe.model.seq_length, tokens)
    if not len(text):
        what = f"holds less than one sequence of {recipe.model.seq_length} tokens for the routers"
        raise UserError(f"domains.{domain}.train", what, "give it more text")
    return text
