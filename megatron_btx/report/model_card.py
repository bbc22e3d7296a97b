"""The card of a model that a run made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_btx.evaluate.results import Results, SystemResult
from megatron_btx.families.card import Card, CardModel, Claim, cell, table
from megatron_btx.provenance import code_revision, versions
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.load import dump
from megatron_btx.recipe.schema import Recipe
from megatron_btx.recipe.stages import directory
from megatron_btx.recipe.systems import TableRow
from megatron_btx.report.figures import of_routing
from megatron_btx.report.routing import RoutingView
from megatron_btx.report.table import title
from megatron_btx.weights.find_checkpoint import find_checkpoint
from megatron_btx.weights.integrity import HASHES

PICTURE = "routing.svg"

_METHODS = {
    "btx": "Branch-Train-MiX ([arXiv 2403.07816](https://arxiv.org/abs/2403.07816)): experts were "
    "trained from copies of one seed without communication, their feed-forward layers became the "
    "experts of a mixture, all else was averaged, and a finetuning taught the routers.",
    "upcycling": "Sparse upcycling: every expert began as the seed's feed-forward layer, and all "
    "was trained on.",
    "btm": "The average of the experts' weights (Branch-Train-Merge, arXiv 2208.03306).",
    "dense": "The dense baseline: the seed, trained on with the same tokens without experts.",
    "seed": "The seed, from which experts are branched.",
}


def run_card(
    recipe: Recipe,
    run_dir: Path,
    row: TableRow,
    architecture: Architecture,
    claims: Sequence[Mapping[str, Any]],
) -> tuple[Card, dict[str, bytes]]:
    """A model's card, and the pictures that it shows.

    Args:
        recipe: the run's.
        run_dir: its directory.
        row: which model.
        architecture: of the model.
        claims: what was checked (``evaluate/export_model.py``).
    """
    results = Results.read(run_dir)
    found = results.systems.get(row.name) if results is not None else None
    sections, pictures = {"Recipe": f"```yaml\n{_recipe(recipe)}```"}, {}
    if results is not None and found is not None:
        sections = {
            "Training": _training(found),
            "Held-out loss": _losses(results),
            **sections,
        }
        if found.load:
            view = RoutingView(
                name=recipe.name,
                moment="on held-out text",
                balance_loss_coeff=recipe.routing.balance_loss_coeff,
                experts=list(found.experts),
                load=dict(found.load),
                gate=dict(found.gate),
                expert_choice=found.expert_choice,
            )
            pictures[PICTURE] = of_routing([view]).svg.encode()
            said = "Share of each domain's choices by layer and expert, and the mean gate."
            sections["Routing"] = f"{said}\n\n![routing]({PICTURE})"
    card = Card(
        title=f"{recipe.name}: {title(row.name)}",
        method=_METHODS.get(row.name) or f"An expert: the seed, trained on {row.name[7:]}.",
        architecture=architecture,
        models=_models(recipe, run_dir, row),
        sections=sections,
        claims=[Claim(**claim) for claim in claims],
        versions=versions(),
        code=code_revision(),
    )
    return card, pictures


def _recipe(recipe: Recipe) -> str:
    """With all defaults; a fence inside it would end the block."""
    return dump(recipe).replace("```", "'''")


def _models(recipe: Recipe, run_dir: Path, row: TableRow) -> list[CardModel]:
    """The models of a mixture or an average with a hash of each; else the one itself."""
    if row.models == ("finetune",):
        stages = [name if name == "seed" else f"expert:{name}" for name in recipe.model_names]
        kinds = [f"expert {place}" for place in range(len(stages))]
    else:
        stages = list(row.models)
        kinds = ["averaged" if len(stages) > 1 else "the model"] * len(stages)
    found = []
    for stage, kind in zip(stages, kinds, strict=True):
        path = find_checkpoint(directory(run_dir, stage))
        place = str(path.relative_to(run_dir)) if path.is_relative_to(run_dir) else path.name
        taken = "" if stage == "finetune" else _taken(recipe, stage)
        found.append(CardModel(name=f"{stage}{taken}", what=kind, path=place, sha256=_hash(path)))
    return found


def _hash(path: Path) -> dict[str, str]:
    """One that stands for all files of a checkpoint."""
    listed = path / HASHES
    if not listed.is_file():
        return {}
    return {f"{path.name}/{HASHES}": hashlib.sha256(listed.read_bytes()).hexdigest()}


def _taken(recipe: Recipe, stage: str) -> str:
    block = recipe.seed if stage == "seed" else recipe.experts.get(stage.removeprefix("expert:"))
    return "" if block is None or block.from_ is None else f" (taken from {Path(block.from_).name})"


def _training(found: SystemResult) -> str:
    rows = [
        (stage, _count(cost.tokens), "unknown" if cost.flops is None else f"{cost.flops:.3e}")
        for stage, cost in found.stages.items()
    ]
    return table(("stage", "tokens", "FLOPs"), rows)


def _losses(results: Results) -> str:
    heading = ["nats a token", *results.columns, "tokens after the seed", "FLOPs"]
    rows = []
    for name, system in results.systems.items():
        losses = [f"{system.loss[c]:.3f}" if c in system.loss else "" for c in results.columns]
        flops = "unknown" if system.train_flops is None else f"{system.train_flops:.3e}"
        rows.append((title(name), *losses, _count(system.train_tokens), flops))
    said = ", ".join(
        f"{cell(name)} {_count(text.get('tokens'))}" for name, text in results.text.items()
    )
    return table(heading, rows) + (f"\n\nTokens of held-out text: {said}." if said else "")


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"
