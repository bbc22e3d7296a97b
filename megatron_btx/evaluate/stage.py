"""The evaluation stage: held-out loss of every system on every domain, and what each cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_btx.data.mixture import HeldOutText, held_out
from megatron_btx.engine import distributed
from megatron_btx.engine.checkpoint import final_checkpoint
from megatron_btx.engine.initializer import initialize
from megatron_btx.engine.model import DTYPES, build_model
from megatron_btx.evaluate.heldout import HeldOut, evaluate
from megatron_btx.files import write_json
from megatron_btx.mix.copy import copy
from megatron_btx.recipe import count
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Evaluate, Precision, Recipe
from megatron_btx.recipe.stages import directory, training
from megatron_btx.weights.megatron import open_megatron


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """A model of the table and the stages that made it after the seed (the seed: itself)."""

    name: str
    stage: str
    """The stage whose final checkpoint it is."""
    made_by: tuple[str, ...]


def systems(recipe: Recipe) -> Iterator[System]:
    """The rows of the table, in its order."""
    experts = tuple(f"expert:{domain}" for domain in recipe.experts)
    yield System(name="seed", stage="seed", made_by=("seed",))
    for expert in experts:
        yield System(name=expert, stage=expert, made_by=(expert,))
    if recipe.dense is not None:
        yield System(name="dense", stage="dense", made_by=("dense",))
    yield System(name="btx", stage="finetune", made_by=(*experts, "finetune"))


def run(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """Evaluate every system and write ``results.json``.

    Returns:
        ``{"results": "results.json"}``.

    Raises:
        UserError: a checkpoint or the held-out text is missing or damaged.
    """
    settings = recipe.evaluate
    distributed.initialize(settings.layout, recipe.random_seed)
    domains = held_out(recipe, run_dir, tokens=settings.tokens)
    progress = directory(run_dir, "evaluate") / "progress.json"
    table: dict[str, Any] = {}
    rows = list(systems(recipe))
    for index, system in enumerate(rows):
        if distributed.is_first_rank():
            write_json(progress, {"what": system.name, "done": index / len(rows)})
        table[system.name] = _row(recipe, run_dir, system, domains)
    if distributed.is_first_rank():
        write_json(
            run_dir / "results.json",
            {"recipe": recipe.name, "domains": list(domains), "systems": table},
        )
    distributed.shutdown()
    return {"results": "results.json"}


def _row(
    recipe: Recipe, run_dir: Path, system: System, domains: dict[str, HeldOutText]
) -> dict[str, Any]:
    checkpoint = final_checkpoint(directory(run_dir, system.stage))
    precision = training(recipe, system.stage).precision
    architecture, result = evaluate_checkpoint(
        checkpoint, domains, recipe.evaluate, precision, recipe.random_seed
    )
    parameters = count.parameters(architecture)
    row: dict[str, Any] = {
        "loss": result.loss,
        "train_tokens": sum(_tokens(recipe, stage) for stage in system.made_by),
        "train_flops": sum(_flops(recipe, stage, architecture) for stage in system.made_by),
        "params_total": parameters.total,
        "params_active": parameters.active,
        "inference_flops_per_token": count.forward_flops_per_token(architecture),
        "checkpoint": str(checkpoint.relative_to(run_dir)),
    }
    if result.load is not None:
        row |= {"load": result.load, "gate": result.gate, "experts": list(architecture.experts)}
    return row


def evaluate_checkpoint(
    checkpoint: Path,
    domains: dict[str, HeldOutText],
    settings: Evaluate,
    precision: Precision,
    random_seed: int,
) -> tuple[Architecture, HeldOut]:
    """Load a checkpoint under the evaluation's layout and evaluate it."""
    source = open_megatron(checkpoint, "model")
    model = build_model(source.architecture, settings.layout, precision, random_seed=random_seed)
    initialize(model, copy(source, dtype=DTYPES[precision]))
    with torch.no_grad():
        result = evaluate(model, domains, micro_batch_size=settings.micro_batch_size)
    return source.architecture, result


def _tokens(recipe: Recipe, stage: str) -> int:
    return count.trained_tokens(training(recipe, stage), recipe.model)


def _flops(recipe: Recipe, stage: str, evaluated: Architecture) -> int:
    """Training FLOPs of a stage: only the finetuning trains the mixed model."""
    dense = Architecture(model=recipe.model, vocab_size=evaluated.vocab_size)
    architecture = evaluated if stage == "finetune" else dense
    return _tokens(recipe, stage) * count.training_flops_per_token(architecture)
