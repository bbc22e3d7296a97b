"""The evaluation stage: held-out loss of every system on every domain, and what each cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_btx.data import Progress
from megatron_btx.data.heldout_sequences import HeldOutText, held_out
from megatron_btx.data.tokenizer import load_tokenizer
from megatron_btx.engine import distributed
from megatron_btx.engine.initializer import initialize
from megatron_btx.engine.model import DTYPES, build_model
from megatron_btx.evaluate.btm_heldout import btm_heldout, training_text
from megatron_btx.evaluate.heldout_loss import (
    Batch,
    HeldOut,
    Listener,
    check_finite,
    evaluate,
    text_of,
)
from megatron_btx.evaluate.results import Results, StageCost, SystemResult
from megatron_btx.evaluate.routing_stats import expert_choice
from megatron_btx.files import ProgressFile, find_json, write_json
from megatron_btx.mix.average import average
from megatron_btx.mix.one_model import copy
from megatron_btx.recipe import count, freezing
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.load import digest
from megatron_btx.recipe.schema import Evaluate, Precision, Recipe
from megatron_btx.recipe.stages import directory, training
from megatron_btx.recipe.systems import TableRow, rows
from megatron_btx.weights.find_checkpoint import find_checkpoint
from megatron_btx.weights.manifest import read_manifest
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.plan import Plan

Domains = Mapping[str, HeldOutText]


def run(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """Evaluate every system and write ``results.json``.

    What is measured of a model is kept beside it (``<stage>/heldout/``), for the other systems that
    it is a part of.

    Returns:
        ``{"results": "results.json"}``.

    Raises:
        UserError: a checkpoint or the held-out text is missing or damaged, or a model computes NaN
            or infinity on it.
    """
    settings = recipe.evaluate
    distributed.initialize(settings.layout, recipe.random_seed)
    domains = held_out(recipe, run_dir, tokens=settings.tokens)
    text = distributed.from_first_rank(text_of(domains) if distributed.is_first_rank() else None)
    progress = ProgressFile(directory(run_dir, "evaluate") / "progress.json")
    table: dict[str, SystemResult] = {}
    systems = rows(recipe)
    for index, row in enumerate(systems):
        if distributed.is_first_rank():
            progress(row.name, index / len(systems))
        if recipe.system == row.name == "btm":
            measured = _ensemble(recipe, run_dir, row, domains)
        else:
            through = _Through(progress, row.name, domains, (index, len(systems)))
            measured = _single(recipe, run_dir, row, domains, text, through)
        table[row.name] = _with_training(recipe, run_dir, row, measured)
    if distributed.is_first_rank():
        results = Results(recipe=recipe.name, domains=tuple(domains), text=text, systems=table)
        results.write(run_dir / "results.json")
    distributed.shutdown()
    return {"results": "results.json"}


class _Through:
    """Tells ``progress`` how much of a model's text has been through it. The first rank does, of
    its share."""

    def __init__(
        self, progress: Progress, what: str, domains: Domains, place: tuple[int, int]
    ) -> None:
        self.progress, self.what, self.place = progress, what, place
        self.left = self.all = sum(len(one) for one in domains.values())

    def __call__(self, batch: Batch) -> None:
        """A micro-batch has been."""
        self.left -= len(batch["tokens"]) * parallel_state.get_data_parallel_world_size()
        if distributed.is_first_rank() and self.left > 0:
            index, count = self.place
            self.progress(self.what, (index + 1 - self.left / self.all) / count)


def evaluate_plan(
    plan: Plan,
    domains: Domains,
    settings: Evaluate,
    precision: Precision,
    random_seed: int,
    listener: Listener | None = None,
) -> HeldOut:
    """Build a plan's model under the evaluation's layout, and evaluate it."""
    model = build_model(plan.architecture, settings.layout, precision, random_seed=random_seed)
    initialize(model, plan)
    with torch.no_grad():
        most = settings.micro_batch_size
        return evaluate(model, domains, micro_batch_size=most, listener=listener)


def evaluate_checkpoint(
    checkpoint: Path,
    domains: Domains,
    settings: Evaluate,
    precision: Precision,
    random_seed: int,
    listener: Listener | None = None,
) -> tuple[Architecture, HeldOut]:
    """Load a checkpoint under the evaluation's layout and evaluate it."""
    plan = copy(open_megatron(checkpoint, "model"), dtype=DTYPES[precision])
    found = evaluate_plan(plan, domains, settings, precision, random_seed, listener)
    return plan.architecture, found


def _single(
    recipe: Recipe,
    run_dir: Path,
    row: TableRow,
    domains: Domains,
    text: Mapping[str, Any],
    listener: Listener,
) -> SystemResult:
    """One model, taken from what is kept beside it where it has been evaluated on this text. All
    that its losses depend on is in the file's name; layout and micro-batches change nothing."""
    (stage,) = row.models
    checkpoint = find_checkpoint(directory(run_dir, stage))
    key = (find_json(directory(run_dir, stage) / "stage.json") or {}).get("key")
    precision = training(recipe, stage).precision
    depends = {"stage": key, "checkpoint": checkpoint.name, "text": text, "precision": precision,
               "random_seed": recipe.random_seed}  # fmt: skip
    kept = directory(run_dir, stage) / "heldout" / f"{digest(depends)[:16]}.json"
    known = distributed.from_first_rank(find_json(kept))
    if known is None or set(known) != {each.name for each in fields(HeldOut)}:
        architecture, found = evaluate_checkpoint(
            checkpoint, domains, recipe.evaluate, precision, recipe.random_seed, listener
        )
        check_finite(row.name, found)
        if distributed.is_first_rank():
            kept.parent.mkdir(exist_ok=True)
            write_json(kept, asdict(found))
    else:
        architecture, found = read_manifest(checkpoint)[0], HeldOut(**known)
    return _measured(row, architecture, found)


def _measured(row: TableRow, architecture: Architecture, found: HeldOut) -> SystemResult:
    check_finite(row.name, found)
    parameters = count.parameters(architecture)
    return SystemResult(
        name=row.name,
        loss=found.loss,
        load=found.load or {},
        gate=found.gate or {},
        params_total=parameters.total,
        params_active=parameters.active,
        inference_flops_per_token=count.forward_flops_per_token(architecture),
        experts=architecture.experts,
        expert_choice=expert_choice(architecture.routing),
    )


def _ensemble(recipe: Recipe, run_dir: Path, row: TableRow, domains: Domains) -> SystemResult:
    """Branch-Train-Merge, of experts and seed as they are."""
    names = [stage.removeprefix("expert:") for stage in row.models]
    models = {
        name: find_checkpoint(directory(run_dir, stage))
        for name, stage in zip(names, row.models, strict=True)
    }
    settings, precision = recipe.evaluate, training(recipe, row.models[0]).precision
    method = recipe.btm.method
    if method == "average":
        sources = [open_megatron(checkpoint, name) for name, checkpoint in models.items()]
        plan = average(sources, dtype=DTYPES[precision])
        found = evaluate_plan(plan, domains, settings, precision, recipe.random_seed)
        return _measured(row, plan.architecture, found)
    ensemble = btm_heldout(
        models,
        domains,
        method=method,
        corpora=training_text(recipe, run_dir),
        tokenizer=load_tokenizer(run_dir / "prepare" / "tokenizer"),
        settings=settings,
        precision=precision,
        random_seed=recipe.random_seed,
    )
    check_finite(row.name, ensemble.heldout)
    cost = ensemble.cost
    return SystemResult(
        name=row.name,
        loss=ensemble.heldout.loss,
        params_total=cost.params_total,
        params_active=cost.params_active,
        inference_flops_per_token=cost.inference_flops_per_token,
    )


def _with_training(
    recipe: Recipe, run_dir: Path, row: TableRow, measured: SystemResult
) -> SystemResult:
    """With the tokens and FLOPs of the stages that made it, and its checkpoints."""
    stages = {stage: _cost(recipe, run_dir, stage) for stage in row.made_by}
    checkpoints = [find_checkpoint(directory(run_dir, stage)) for stage in row.models]
    return replace(
        measured,
        stages=stages,
        train_tokens=_total(stage.tokens for stage in stages.values()),
        train_flops=_total(stage.flops for stage in stages.values()),
        checkpoint=tuple(str(path.relative_to(run_dir)) for path in checkpoints),
    )


def _cost(recipe: Recipe, run_dir: Path, stage: str) -> StageCost:
    """Tokens and training FLOPs of a stage, of the model that it trained. A model that was taken
    instead of trained may say how many tokens it has seen: a Hugging Face model does not,
    and its conversion counts none."""
    block = training(recipe, stage)
    architecture, manifest = read_manifest(find_checkpoint(directory(run_dir, stage)))
    taken = block.from_ is not None
    if not taken:
        flops = freezing.stage_flops(architecture, block, recipe.model)
        return StageCost(tokens=count.trained_tokens(block, recipe.model), flops=flops)
    tokens = manifest.get("tokens") or None
    if tokens is None:
        return StageCost()
    return StageCost(tokens=tokens, flops=tokens * count.training_flops_per_token(architecture))


def _total(parts: Iterable[int | None]) -> int | None:
    """The sum, if every part is known."""
    found = list(parts)
    known = [part for part in found if part is not None]
    return sum(known) if len(known) == len(found) else None
