"""Any finished model of a run as a Hugging Face directory, with what is checked of it: the work of
``btx export``."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_btx.data.mixture import held_out
from megatron_btx.data.tokenizer import load_tokenizer
from megatron_btx.engine.initializer import initialize
from megatron_btx.engine.model import build_model
from megatron_btx.engine.moe.router import dropless
from megatron_btx.errors import UserError
from megatron_btx.evaluate import export_stage
from megatron_btx.families.export import carried, write_hf
from megatron_btx.families.hf import open_hf
from megatron_btx.families.tokenizer_identity import differences
from megatron_btx.mix.average import average
from megatron_btx.mix.one_model import copy
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Layout, Recipe
from megatron_btx.recipe.stages import directory
from megatron_btx.recipe.systems import row_of
from megatron_btx.weights.card import Claim
from megatron_btx.weights.find_checkpoint import find_checkpoint
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.plan import Checkpoint, Plan
from megatron_btx.weights.source import read_whole

LOGITS = 1e-3
"""Of either side, fp32, over their standard deviation: sums in another order; 1e-6 is usual."""


def export_model(run_dir: Path, name: str, out: Path, *, check: bool) -> dict[str, Any]:
    """Write it, and check what was written.

    Args:
        run_dir: of a run.
        name: see :func:`megatron_btx.recipe.systems.row_of`.
        out: the new directory.
        check: compare with ``transformers`` too.

    Returns:
        ``{"architecture", "claims", "llama_cpp"}``, as JSON.

    Raises:
        UserError: no family computes the model, it is not finished, or what was written differs.
    """
    recipe = load_recipe(run_dir / "recipe.yaml")
    row = row_of(recipe, name)
    checkpoints = {stage: find_checkpoint(directory(run_dir, stage)) for stage in row.models}
    models = [open_megatron(path, stage) for stage, path in checkpoints.items()]
    plan = _plan(models)
    tokenizer = load_tokenizer(run_dir / "prepare" / "tokenizer")
    tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    known = carried(models[0]) | {key: value for key, value in tokens.items() if value is not None}
    write_hf(plan, out, known=known, files=partial(export_stage.saved_files, tokenizer))
    claims = [_bits(plan, out), _tokenizer(run_dir, out)]
    if check and importlib.util.find_spec("transformers") is not None:
        claims += _against_transformers(recipe, run_dir, models, out)
    return {
        "architecture": plan.architecture.to_json(),
        "claims": [{"claim": c.claim, "figure": c.figure, "command": c.command} for c in claims],
        "llama_cpp": export_stage.llama_cpp(plan.architecture, out),
    }


def _plan(models: list[Checkpoint], dtype: torch.dtype | None = None) -> Plan:
    """The model as it is stored, or the average."""
    stored = next(iter(models[0].tensors.values())).dtype
    if len(models) > 1:
        return average(models, dtype=dtype or stored)
    return copy(models[0], dtype=dtype or stored)


def _bits(plan: Plan, out: Path) -> Claim:
    """Every tensor that was written, read back under our names."""
    again = open_hf(out, "again")
    different = [
        name for name in plan.targets
        if not torch.equal(plan.evaluate(name), read_whole(again.source, name))
    ]  # fmt: skip
    if different:
        what = f"{len(different)} tensors are not what was exported: {', '.join(different[:3])}"
        raise UserError(str(out), what, "report this with the recipe: the export is wrong")
    return Claim(
        claim="every tensor reads back bit for bit",
        figure={"tensors": len(plan.targets), "different": 0},
        command="btx export RUN --out DIR",
    )


def _tokenizer(run_dir: Path, out: Path) -> Claim:
    """Vocabulary, merges and normaliser, of the run's tokenizer and the exported one."""
    if unlike := differences(run_dir / "prepare" / "tokenizer", out):
        what = f"its tokenizer is not the run's: {'; '.join(unlike)}"
        raise UserError(str(out), what, "report this with the recipe: the export is wrong")
    return Claim(
        claim="the tokenizer is the one that was trained with",
        figure={"differences": 0},
        command="btx export RUN --out DIR",
    )


def _against_transformers(
    recipe: Recipe, run_dir: Path, models: list[Checkpoint], out: Path
) -> Iterator[Claim]:
    """Logits and held-out loss of both, in fp32."""
    plan = export_stage.as_exported(_plan(models, torch.float32))
    worst = _logits(recipe, run_dir, plan, out)
    if worst > LOGITS:
        what = f"transformers computes other logits: {worst:.1e} of their standard deviation apart"
        raise UserError(str(out), what, "report this with the recipe: the export is wrong")
    yield Claim(
        claim="logits are those of transformers, fp32, over their standard deviation",
        figure={"difference": worst},
        command="btx export RUN --out DIR",
    )
    one = replace(recipe, evaluate=replace(recipe.evaluate, layout=Layout()))
    yield Claim(
        claim="held-out losses are those of transformers, nats a token",
        figure=export_stage.compare(one, run_dir, plan, out),
        command="btx export RUN --out DIR",
    )


@torch.no_grad()
def _logits(recipe: Recipe, run_dir: Path, plan: Plan, out: Path) -> float:
    """The largest difference on a held-out sequence of each domain, over the logits' deviation."""
    texts = held_out(recipe, run_dir, tokens=recipe.model.seq_length, plain=True)
    tokens = torch.stack([text[0]["tokens"] for text in texts.values()])
    module = build_model(plan.architecture, Layout(), "fp32").eval()
    initialize(module, plan)
    places = torch.arange(tokens.shape[1]).expand(tokens.shape)
    here = torch.cuda.current_device()
    with dropless(module):
        ours = module(tokens.to(here), places.to(here), attention_mask=None).float().cpu()
    theirs = export_stage.transformers_model(out)(tokens).logits
    return float((ours[..., : theirs.shape[-1]] - theirs).abs().max() / theirs.std())
