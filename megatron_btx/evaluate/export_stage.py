"""The export stage: the finished MoE as a Hugging Face model, and the proof that it is the same."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_btx.data.mixture import HeldOutText, held_out
from megatron_btx.data.tokenizer import Tokenizer, load_tokenizer
from megatron_btx.engine import distributed
from megatron_btx.errors import UserError
from megatron_btx.evaluate.evaluate_stage import evaluate_plan
from megatron_btx.families.export import export_hf
from megatron_btx.families.hf import read_config
from megatron_btx.families.hf_routing import HFRouting
from megatron_btx.families.llama_cpp import unlike
from megatron_btx.mix.one_model import copy
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Recipe
from megatron_btx.recipe.stages import directory
from megatron_btx.weights.find_checkpoint import find_checkpoint
from megatron_btx.weights.manifest import read_manifest
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.plan import Plan

logger = logging.getLogger(__name__)

SEQUENCES = 16
"""Held-out sequences a domain on which the two are compared."""

TOLERANCE = 1e-4
"""Nats per token. Both compute in fp32, in another order of sums: about 1e-6 is seen; the first
wrong constant (a RoPE base, an epsilon, a gate's normalisation) shows at 1e-2."""


def run(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """Write ``export/hf`` and compare its loss in ``transformers`` with Megatron's.

    Returns:
        ``{"hf": its directory, "loss": {"megatron", "transformers", "difference"}}``; without
        ``transformers`` (or with ``export.check: false``) no ``loss``. ``"llama_cpp"`` where that
        does not compute the model (families/llama_cpp.py).

    Raises:
        UserError: no family computes what this MoE computes, or the losses differ.
    """
    checkpoint = find_checkpoint(directory(run_dir, "finetune"))
    out = directory(run_dir, "export") / "hf"
    if not out.exists():
        _write(checkpoint, out, load_tokenizer(run_dir / "prepare" / "tokenizer"))
    outputs: dict[str, Any] = {"hf": str(out.relative_to(run_dir))}
    if told := llama_cpp(read_manifest(checkpoint)[0], out):
        logger.warning("llama.cpp does not compute this model: %s", "; ".join(told))
        outputs["llama_cpp"] = told
    if recipe.export.check and importlib.util.find_spec("transformers") is None:
        logger.warning("transformers is not installed: the exported model's loss is not compared")
    elif recipe.export.check:
        distributed.initialize(recipe.evaluate.layout, recipe.random_seed)
        plan = copy(open_megatron(checkpoint, "model"), dtype=torch.float32)
        outputs["loss"] = compare(recipe, run_dir, plan, out)
        distributed.shutdown()
    return outputs


def _write(checkpoint: Path, out: Path, tokenizer: Tokenizer) -> None:
    """Weights, configuration and tokenizer; found under its name only when all are there."""

    begin, end = tokenizer.bos_id, tokenizer.eos_id
    files = partial(saved_files, tokenizer)
    export_hf(checkpoint, out, bos_token_id=begin, eos_token_id=end, files=files)


def saved_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """What ``transformers`` reads of a tokenizer."""
    with tempfile.TemporaryDirectory() as made:
        tokenizer.save_huggingface(made)
        return {path.name: path.read_bytes() for path in sorted(Path(made).iterdir())}


def llama_cpp(architecture: Architecture, exported: Path) -> list[str]:
    """Why llama.cpp does not compute a model as it was exported (families/llama_cpp.py)."""
    family, _, _ = read_config(exported)
    return unlike(architecture, family.model_type)


def compare(recipe: Recipe, run_dir: Path, plan: Plan, exported: Path) -> dict[str, float]:
    """Mean held-out loss of both, on the same sequences, both in fp32. The job's groups are there.

    Raises:
        UserError: they differ by more than ``TOLERANCE``.
    """
    settings = recipe.evaluate
    domains = held_out(recipe, run_dir, tokens=SEQUENCES * recipe.model.seq_length, plain=True)
    ours = evaluate_plan(as_exported(plan), domains, settings, "fp32", recipe.random_seed)
    theirs = transformers_loss(exported, domains, settings.micro_batch_size)
    losses = {"megatron": ours.loss["mean"], "transformers": sum(theirs.values()) / len(theirs)}
    losses["difference"] = max(abs(ours.loss[name] - theirs[name]) for name in theirs)
    if losses["difference"] > TOLERANCE:
        raise UserError(
            str(exported),
            f"transformers computes another loss than Megatron: {losses}",
            "report this with the recipe: the export is wrong",
        )
    return losses


def as_exported(plan: Plan) -> Plan:
    """A plan whose routing is that of the exported model: no capacity, no draws."""
    if plan.architecture.routing is None:
        return plan
    gates = HFRouting.of(plan.architecture).routing()
    return replace(plan, architecture=replace(plan.architecture, routing=gates))


def transformers_model(directory: Path) -> Any:
    """A Hugging Face directory as ``transformers`` reads it, fp32; its progress bar is not for a
    stage's log."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def transformers_loss(
    exported: Path, domains: dict[str, HeldOutText], batch_size: int
) -> dict[str, float]:
    """Nats per token of an exported model by domain, computed by ``transformers`` in fp32."""
    model = transformers_model(exported)
    losses = {}
    for name, text in domains.items():
        total, tokens = 0.0, 0
        for first in range(0, len(text), batch_size):
            rows = [text[place] for place in range(first, min(first + batch_size, len(text)))]
            logits = model(input_ids=torch.stack([row["tokens"] for row in rows])).logits
            labels = torch.stack([row["labels"] for row in rows])
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).double(), labels.flatten(), reduction="sum"
            ).item()
            tokens += labels.numel()
        losses[name] = total / tokens
    return losses
