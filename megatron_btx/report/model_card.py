"""The card of a model that a run made. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.evaluate.results import Results, SystemResult
from megatron_btx.files import newest_step
from megatron_btx.provenance import code_revision, versions
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.load import WHERE_IT_RUNS, different
from megatron_btx.recipe.schema import Recipe
from megatron_btx.recipe.stages import directory
from megatron_btx.recipe.systems import TableRow, row_of
from megatron_btx.report.figure_files import of_routing
from megatron_btx.report.routing import RoutingView
from megatron_btx.report.table import title
from megatron_btx.weights.card import Card, CardModel, Claim, cell, engines, table
from megatron_btx.weights.directory import add_files
from megatron_btx.weights.file_hashes import HASHES
from megatron_btx.weights.find_checkpoint import find_checkpoint
from megatron_btx.weights.manifest import read_manifest

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
    llama_cpp: Sequence[str],
) -> tuple[Card, dict[str, bytes]]:
    """A model's card, and the pictures that it shows.

    Args:
        recipe: the run's.
        run_dir: its directory.
        row: which model.
        architecture: of the model.
        claims: what was checked (``evaluate/export.py``).
        llama_cpp: why that does not compute the model (families/llama_cpp.py).
    """
    results = Results.read(run_dir)
    found = results.systems.get(row.name) if results is not None else None
    pictures = {}
    sections = {"Recipe": f"```yaml\n{_recipe(recipe)}```", **engines(llama_cpp)}
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


def complete_export(recipe: Recipe, run_dir: Path, done: Mapping[str, Any]) -> None:
    """Put the card into what the export stage wrote, with all that the run has measured by now. A
    stage that is another run's is left as it is.

    Args:
        recipe: the run's.
        run_dir: its directory.
        done: the stage's ``done.json``.
    """
    place = run_dir / str(done.get("outputs", {}).get("hf"))
    if not (place / "config.json").is_file() or any(p.is_symlink() for p in (place, place.parent)):
        return
    losses = done["outputs"].get("loss")
    claims = [] if losses is None else [
        {
            "claim": "held-out losses are those of transformers, nats a token",
            "figure": losses,
            "command": "btx run RECIPE",
        }
    ]  # fmt: skip
    architecture, _ = read_manifest(find_checkpoint(directory(run_dir, "finetune")))
    row = row_of(recipe, "finetune")
    told = done["outputs"].get("llama_cpp", [])
    card, pictures = run_card(recipe, run_dir, row, architecture, claims, told)
    files = {**card.files(), **pictures}
    known = {name: place / name for name in files if (place / name).is_file()}
    if any(name not in known or known[name].read_bytes() != files[name] for name in files):
        add_files(place, files)


def _recipe(recipe: Recipe) -> str:
    """What differs from the defaults and decides the result; of a path its last part. A fence
    inside it would end the block."""
    said = {key: value for key, value in different(recipe).items() if key not in WHERE_IT_RUNS}
    text = yaml.safe_dump(_without_places(said), sort_keys=False, allow_unicode=True, width=100)
    return str(text).replace("```", "'''")


def _without_places(value: Any) -> Any:
    """Without what absolute paths say of their author's machine."""
    if isinstance(value, dict):
        return {key: _without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


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
        own = directory(run_dir, stage)
        if row.models == ("finetune",) and newest_step(own) is None:  # what it was mixed of
            named, what = f"{stage}{_taken(recipe, stage)}", f"{kind}; its checkpoint was removed"
            found.append(CardModel(name=named, what=what, path=own.name, sha256={}))
            continue
        path = find_checkpoint(own)
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
