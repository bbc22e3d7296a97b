"""A finished model of a run as a Hugging Face directory, compared with Megatron's: the stage
``export`` (:func:`run`), and ``btx export`` (:func:`export_model`), which checks more."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_btx.data.heldout_sequences import HeldOutText, held_out
from megatron_btx.data.tokenizer import Tokenizer, load_tokenizer
from megatron_btx.engine import distributed
from megatron_btx.engine.initializer import initialize
from megatron_btx.engine.model import build_model
from megatron_btx.engine.moe.router import dropless
from megatron_btx.errors import UserError
from megatron_btx.evaluate.evaluate_stage import evaluate_plan
from megatron_btx.families.export import carried, export_hf, write_hf
from megatron_btx.families.hf import open_hf
from megatron_btx.families.hf_routing import as_exported
from megatron_btx.families.llama_cpp import unlike_written
from megatron_btx.families.tokenizer_identity import differences
from megatron_btx.mix.average import average
from megatron_btx.mix.one_model import copy
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Layout, Recipe
from megatron_btx.recipe.stages import directory
from megatron_btx.recipe.systems import row_of
from megatron_btx.weights.card import Claim
from megatron_btx.weights.find_checkpoint import find_checkpoint
from megatron_btx.weights.manifest import read_manifest
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.plan import Checkpoint, Plan
from megatron_btx.weights.source import read_whole

logger = logging.getLogger(__name__)

SEQUENCES = 16
"""Held-out sequences a domain on which the two are compared."""
TOLERANCE = 1e-4
"""Nats per token. Both compute in fp32, in another order of sums: about 1e-6 is seen; the first
wrong constant (a RoPE base, an epsilon, a gate's normalisation) shows at 1e-2."""
LOGITS = 1e-3
"""Of either side, fp32, over their standard deviation: sums in another order; 1e-6 is usual."""


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
    if told := unlike_written(read_manifest(checkpoint)[0], out):
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


def compare(recipe: Recipe, run_dir: Path, plan: Plan, exported: Path) -> dict[str, float]:
    """Mean held-out loss of both, on the same sequences, both in fp32. The job's groups are there.

    Raises:
        UserError: they differ by more than ``TOLERANCE``, or the tokenizers give other ids.
    """
    settings = recipe.evaluate
    domains = held_out(recipe, run_dir, tokens=SEQUENCES * recipe.model.seq_length, plain=True)
    tokenizer = load_tokenizer(run_dir / "prepare" / "tokenizer")
    check_ids(tokenizer, [text[0]["tokens"] for text in domains.values()], exported)
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


def check_ids(tokenizer: Tokenizer, sequences: Iterable[Tensor], exported: Path) -> None:
    """That ``AutoTokenizer`` gives the ids of our tokenizer for the documents of ``sequences``
    (token ids [n]). It doesn't always go by the files: for some model types (``qwen2``) it makes
    the tokenizer of the released models, whatever ``tokenizer_config.json`` names.

    Raises:
        UserError: it gives others.
    """
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    for sequence in sequences:
        ends = (sequence == tokenizer.eos_id).nonzero().flatten().tolist()
        for document in torch.tensor_split(sequence, ends):
            text = tokenizer.decode(document[document != tokenizer.eos_id].numpy())
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            if ids != tokenizer.encode([text])[0].tolist():
                raise UserError(
                    str(exported),
                    f"transformers makes a {type(theirs).__name__} of its tokenizer, which gives "
                    "other ids than the run's",
                    "train with the tokenizer of the family's released models, or a model that "
                    "goes out as another family; `export: {check: false}` writes it nevertheless",
                )


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
    write_hf(plan, out, known=known, files=partial(saved_files, tokenizer))
    claims = [_bits(plan, out), _tokenizer(run_dir, out)]
    if check and importlib.util.find_spec("transformers") is not None:
        claims += _against_transformers(recipe, run_dir, models, out)
    return {
        "architecture": plan.architecture.to_json(),
        "claims": [{"claim": c.claim, "figure": c.figure, "command": c.command} for c in claims],
        "llama_cpp": unlike_written(plan.architecture, out),
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
    plan = as_exported(_plan(models, torch.float32))
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
        figure=compare(one, run_dir, plan, out),
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
    theirs = transformers_model(out)(tokens).logits
    return float((ours[..., : theirs.shape[-1]] - theirs).abs().max() / theirs.std())
