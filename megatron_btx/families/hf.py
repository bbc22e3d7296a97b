"""Hugging Face directories as checkpoints under canonical names, and plans under theirs; what a
directory is that holds something else than a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.families.family import Family
from megatron_btx.families.hf_routing import HFRouting
from megatron_btx.families.llama import GRANITE, LLAMA, MISTRAL, PHI3, QWEN2, QWEN3, SMOLLM3
from megatron_btx.families.mixtral import GRANITEMOE, MIXTRAL, QWEN2_MOE, QWEN3_MOE
from megatron_btx.families.table import Table
from megatron_btx.families.tokenizer_files import describe_tokenizer
from megatron_btx.files import read_json
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.names import SHARED_GATE, canonical_tensors
from megatron_btx.weights.box import Shape
from megatron_btx.weights.find_checkpoint import ADAPTER, foreign
from megatron_btx.weights.plan import Checkpoint, Ignore, Plan, mismatches, unmatched
from megatron_btx.weights.random_fill import Fill
from megatron_btx.weights.safetensors import SafetensorsSource
from megatron_btx.weights.source import View, take_all

_DENSE = (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GRANITE, SMOLLM3)
_MIXTURES = (MIXTRAL, QWEN3_MOE, QWEN2_MOE, GRANITEMOE)
FAMILIES = {family.model_type: family for family in (*_DENSE, *_MIXTURES)}
"""By ``model_type``. A model goes out as the first that computes it."""

IGNORED = (Ignore(r".*\.rotary_emb\.inv_freq", "derived from the RoPE base"),)
"""Stored tensors that are not weights. All else must be used."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = Ignore(re.escape(HEAD), "tied to the embedding")


def open_hf(path: Path | str, label: str) -> Checkpoint:
    """A Hugging Face directory (config.json, safetensors) seen under canonical names.

    Raises:
        UserErrors: everything by which the directory differs from what its config.json describes,
            or from what we can compute, at once.
    """
    path = Path(path)
    family, architecture, config = read_config(path)
    source = SafetensorsSource(path, ignored=IGNORED)
    if (unlike := not_as_saved(source.tensors, str(path))) is not None:
        raise unlike
    untied = architecture.model.untie_embeddings_and_output_weights
    if not untied:
        _check_tied(source, path)
    weights = unmatched(source.tensors, IGNORED if untied else (*IGNORED, TIED))
    takes = take_all(label, source)
    tensors = {name: takes[name] for name in weights}
    table = _table(family, fused=_is_fused(tensors))
    fix = "give a model that its config.json describes"
    errors = mismatches(tensors, _tensors(architecture, table), str(path), fix)
    if errors:
        raise UserErrors(errors)
    found = table.to_canonical(tensors, architecture)
    named = {name: found[name] for name in canonical_tensors(architecture)}
    manifest = {**config, "tokenizer": describe_tokenizer(path)}
    return Checkpoint(label, path, architecture, View(source, named), manifest)


def read_config(path: Path) -> tuple[Family, Architecture, dict[str, Any]]:
    """Family and architecture of a Hugging Face directory, and its ``config.json`` as it is.

    Raises:
        UserErrors: it is missing, of another family, or describes what we do not compute.
    """
    where = path / "config.json"
    config = _read_json(path)
    if config.get("quantization_config"):
        raise quantised(config["quantization_config"], str(where))
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        what = f"model_type is {model_type!r:.60}"
        raise UserError(str(where), what, f"use one of {', '.join(FAMILIES)}")
    return family, family.read_config(config, str(where)), config


def family_of(architecture: Architecture, preferred: str | None = None) -> Family:
    """The family that computes an architecture.

    Args:
        architecture: the model.
        preferred: ``model_type`` of the family to take where it is one of them: a Mistral without a
            window is a Llama too.

    Raises:
        UserError: there is none; it says what each one lacks.
    """
    if architecture.experts:
        HFRouting.of(architecture)  # what no family computes is told once
    first = FAMILIES.get(preferred or "")
    why = []
    for family in (*([first] if first else []), *FAMILIES.values()):
        lacking = family.lacks(architecture)
        if not lacking:
            return family
        if bool(architecture.experts) == (family.fused is not None):
            why.append(f"as {family.model_type} {', '.join(lacking)}")
    what = f"no Hugging Face family computes this model: {'; '.join(dict.fromkeys(why))}"
    raise UserError("export", what, "keep it in Megatron's format: btx mix --format megatron")


def wanted(architecture: Architecture, model_type: str) -> Family:
    """The family of that name, which must compute the architecture.

    Raises:
        UserError: it does not, or is none.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        raise UserError(model_type, "is no known family", f"use one of {', '.join(FAMILIES)}")
    if architecture.experts:
        HFRouting.of(architecture)
    if lacking := family.lacks(architecture):
        what = f"does not compute this model: {', '.join(lacking)}"
        raise UserError(model_type, what, f"write a {family_of(architecture).model_type}")
    return family


def hf_tensors(architecture: Architecture, family: Family | None = None) -> dict[str, Shape]:
    """Hugging Face name -> shape, derived from the canonical ones."""
    family = family or family_of(architecture)
    return _tensors(family.stored(architecture), family.table)


def to_hf(plan: Plan, family: Family | None = None, *, fused: bool = False) -> Plan:
    """A plan over canonical names as one over a family's Hugging Face names.

    A shared expert of zeros has a gate of ones: it adds nothing under any, and llama.cpp computes
    the sigmoid as ``silu(x) / x``, NaN where a gate of zeros makes ``x`` zero.

    Args:
        plan: over canonical names.
        family: the one to write; ``None``: that which computes it.
        fused: experts stacked, as ``transformers`` 5 holds them in memory.
    """
    family = family or family_of(plan.architecture)
    stored = family.stored(plan.architecture)
    targets = dict(plan.targets)
    dtype = next(iter(targets.values())).dtype
    for name, shape in canonical_tensors(stored).items():
        if name not in targets and stored != plan.architecture:  # a shared expert of zeros
            value = 1.0 if name.endswith(SHARED_GATE) else 0.0
            targets[name] = Fill(value, shape, dtype)
    table = _table(family, fused=fused)
    named = table.to_hf(targets, stored)
    return replace(plan, targets=named, expected=_tensors(stored, table))


def _table(family: Family, *, fused: bool) -> Table:
    if not fused:
        return family.table
    if family.fused is None:
        raise UserError("--fused", f"a {family.model_type} has no experts", "leave it out")
    return family.fused


def _tensors(architecture: Architecture, table: Table) -> dict[str, Shape]:
    blank = {
        name: Fill(0.0, shape, torch.float32)
        for name, shape in canonical_tensors(architecture).items()
    }
    return {name: tensor.shape for name, tensor in table.to_hf(blank, architecture).items()}


def _is_fused(names: Iterable[str]) -> bool:
    return any(name.endswith(".experts.gate_up_proj") for name in names)


def _check_tied(source: SafetensorsSource, path: Path) -> None:
    """That a head which is stored beside the embedding it is tied to is the same tensor.

    Where they differ, ``transformers`` 4 drops the head and 5 unties them: a directory of two
    meanings.
    """
    stored = source.tensors
    if HEAD not in stored or EMBEDDING not in stored:
        return
    shape = stored[HEAD][0]
    same = shape == stored[EMBEDDING][0]
    if same and len(shape) != 2:
        return  # the embedding's own shape is told
    rows = max(1, (1 << 22) // max(1, prod(shape[1:])))  # 16 MiB of fp32 at a time
    for first in range(0, shape[0] if same else 0, rows):
        box = ((first, min(first + rows, shape[0])), *((0, size) for size in shape[1:]))
        head, embedding = (source.read(name, box) for name in (HEAD, EMBEDDING))
        same = same and torch.equal(head.float(), embedding.float())
    if not same:
        raise UserError(
            str(path / "config.json"),
            f"tie_word_embeddings is true, but the {HEAD} that is stored differs from {EMBEDDING}: "
            "transformers 4 ignores it, 5 computes with it",
            "set tie_word_embeddings to false if the model was trained untied, else remove "
            f"{HEAD} from the weights",
        )


def _read_json(path: Path) -> dict[str, Any]:
    where = path / "config.json"
    if not where.exists():
        what = "not a Hugging Face model directory (no config.json)"
        fix = "give the directory that save_pretrained wrote"
        raise foreign(path) or UserError(str(path), what, fix)
    return read_json(where)


_ADAPTER = (".lora_A.", ".lora_B.", ".lora_magnitude_vector", ".lora_embedding_", ".ia3_")
_QUANTISED = (
    ".qweight", ".qzeros", ".g_idx", ".weight_scale", ".weight_scale_inv", ".weight_packed",
    ".absmax", ".quant_map", ".SCB",
)  # fmt: skip
"""Of GPTQ and AWQ, compressed-tensors and FP8, bitsandbytes."""
_WRAPPERS = {
    "_orig_mod.": ("torch.compile", "model._orig_mod"),
    "module.": ("DistributedDataParallel or DeepSpeed", "model.module"),
    "_fsdp_wrapped_module.": ("FSDP", "the module inside, its state gathered"),
    "base_model.model.": ("peft", "model.merge_and_unload()"),
}
_DEQUANTISE = (
    "give the model before it was quantised; a bitsandbytes one can be turned back: "
    "AutoModelForCausalLM.from_pretrained(DIR).dequantize().save_pretrained(NEW)"
)


def quantised(settings: Any, where: str) -> UserError:
    """A ``config.json`` with ``quantization_config``."""
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    what = f"the weights are quantised (quantization_config{f': {method}' if method else ''})"
    return UserError(where, what, _DEQUANTISE)


def not_as_saved(names: Collection[str], where: str) -> UserError | None:
    """What the stored names are those of, if not of a causal language model of ``transformers``."""
    if any(mark in f"{name}." for name in names for mark in _ADAPTER):
        return UserError(where, ADAPTER.what, ADAPTER.fix)
    if any(name.endswith(_QUANTISED) for name in names):
        return UserError(where, "the weights are quantised", _DEQUANTISE)
    for prefix, (by, inside) in _WRAPPERS.items():
        if names and all(name.startswith(prefix) for name in names):
            what = f"the name of every tensor begins with {prefix}: a model wrapped by {by}"
            return UserError(where, what, f"save {inside}: MODEL.save_pretrained(NEW)")
    if "tok_embeddings.weight" in names:
        what = "tensors under their maker's own names (tok_embeddings.weight)"
        return UserError(where, what, "download the Hugging Face files of the model")
    if "embed_tokens.weight" in names:
        what = "a base model without its head (AutoModel): embed_tokens.weight, no lm_head"
        return UserError(where, what, "save it as AutoModelForCausalLM")
    return None
