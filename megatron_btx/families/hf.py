"""Hugging Face directories as checkpoints under canonical names, and plans under theirs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.families.family import Family
from megatron_btx.families.llama import LLAMA
from megatron_btx.families.mixtral import MIXTRAL
from megatron_btx.families.tokenizer_files import describe_tokenizer
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.weights.box import Shape
from megatron_btx.weights.expression import Fill
from megatron_btx.weights.names import canonical_tensors
from megatron_btx.weights.plan import Checkpoint, Ignore, Plan, mismatches, unmatched
from megatron_btx.weights.safetensors import SafetensorsSource
from megatron_btx.weights.source import View, take_all

FAMILIES = {family.model_type: family for family in (LLAMA, MIXTRAL)}

IGNORED = (Ignore(r".*\.rotary_emb\.inv_freq", "derived from the RoPE base"),)
"""Stored tensors that are not weights. All else must be used."""
TIED = Ignore(r"lm_head\.weight", "tied to the embedding")


def open_hf(path: Path | str, label: str) -> Checkpoint:
    """A Hugging Face directory (config.json, safetensors) seen under canonical names.

    Raises:
        UserErrors: everything by which the directory differs from what its config.json describes,
            or from what we can compute, at once.
    """
    path = Path(path)
    config = _read_config(path)
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        what = f"model_type is {config.get('model_type')!r}"
        raise UserError(str(path / "config.json"), what, f"use one of {', '.join(FAMILIES)}")
    architecture = family.read_config(config, str(path / "config.json"))
    source = SafetensorsSource(path)
    untied = architecture.model.untie_embeddings_and_output_weights
    weights = unmatched(source.tensors, IGNORED if untied else (*IGNORED, TIED))
    takes = take_all(label, source)
    tensors = {name: takes[name] for name in weights}
    fix = "give a model that its config.json describes"
    errors = mismatches(tensors, hf_tensors(architecture), str(path), fix)
    if errors:
        raise UserErrors(errors)
    named = family.table.to_canonical(tensors, architecture)
    manifest = {**config, "tokenizer": describe_tokenizer(path)}
    return Checkpoint(label, path, architecture, View(source, named), manifest)


def hf_tensors(architecture: Architecture) -> dict[str, Shape]:
    """Hugging Face name -> shape, derived from the canonical ones."""
    blank = {
        name: Fill(0.0, shape, torch.float32)
        for name, shape in canonical_tensors(architecture).items()
    }
    named = family_of(architecture).table.to_hf(blank, architecture)
    return {name: tensor.shape for name, tensor in named.items()}


def family_of(architecture: Architecture) -> Family:
    """The family that computes what an architecture computes."""
    return MIXTRAL if architecture.experts else LLAMA


def to_hf(plan: Plan) -> Plan:
    """A plan over canonical names as one over the family's Hugging Face names."""
    family = family_of(plan.architecture)
    targets = family.table.to_hf(plan.targets, plan.architecture)
    return replace(plan, targets=targets, expected=hf_tensors(plan.architecture))


def _read_config(path: Path) -> dict[str, Any]:
    where = path / "config.json"
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "not a Hugging Face model directory (no config.json)"
        raise UserError(str(path), what, "give the directory that save_pretrained wrote") from None
    except ValueError as error:
        raise UserError(str(where), f"not JSON: {error}", "copy the file again") from error
    if not isinstance(config, dict):
        raise UserError(str(where), "not a JSON object", "copy the file again")
    return config
