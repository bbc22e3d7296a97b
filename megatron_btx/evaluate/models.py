"""Checkpoints of any kind as live models on this job's ranks, with their tokenizers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from megatron_btx.data.documents import find_files, read_documents
from megatron_btx.engine.initializer import initialize
from megatron_btx.engine.model import DTYPES, build_model
from megatron_btx.errors import UserError, UserErrors
from megatron_btx.evaluate.btm_heldout import training_text
from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.evaluate.tfidf import TfIdf
from megatron_btx.families.open_checkpoint import open_checkpoint
from megatron_btx.mix.edit_experts import only
from megatron_btx.mix.one_model import copy
from megatron_btx.recipe import check_layout, count
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Layout, Mix, Precision, Recipe, TokenizerBlock, Training
from megatron_btx.weights.plan import Checkpoint


@dataclasses.dataclass(frozen=True)
class Live:
    """A model on this rank, ready to run."""

    architecture: Architecture
    module: torch.nn.Module


def load(
    checkpoint: Checkpoint, layout: Layout, precision: Precision | None, random_seed: int = 0
) -> Live:
    """This rank's part of a checkpoint of either format.

    Args:
        checkpoint: opened.
        layout: of this job.
        precision: ``None``: that of the weights.
        random_seed: of the routing's noise.

    Raises:
        UserError: the layout cannot hold it.
    """
    precision = precision or precision_of(checkpoint)
    architecture = checkpoint.architecture
    _check_layout(architecture, layout if architecture.experts else layout.dense)
    module = build_model(architecture, layout, precision, random_seed=random_seed)
    initialize(module, copy(checkpoint, dtype=DTYPES[precision]))
    return Live(architecture, module.eval())


def _check_layout(architecture: Architecture, layout: Layout) -> None:
    """As a recipe's layouts are checked, on a recipe that would make this model; how long its
    sequences are is looked at where they are made (loss_on_text.py)."""
    model, experts = architecture.model, architecture.experts
    width = count.expert_width(model) if experts else model.ffn_hidden_size
    recipe = Recipe(
        name="model",
        model=dataclasses.replace(model, ffn_hidden_size=width, seq_length=2 * layout.world_size),
        tokenizer=TokenizerBlock(vocab_size=architecture.vocab_size),
        domains={},
        seed=Training(),
        experts={name: Training() for name in experts},
        mix=Mix(include_seed=False),
        finetune=Training(),
    )
    wrong = [
        *check_layout.problems(recipe, "--layout", layout, experts=experts, width=width),
        *check_layout.evaluation(layout, "--layout"),
    ]
    if wrong:
        raise UserErrors([UserError(p.key.replace(".", " ", 1), p.what, p.fix) for p in wrong])


def opened(subject: Subject, tokenizer: str | None = None) -> dict[str, Checkpoint]:
    """The checkpoints of a subject.

    Args:
        subject: what.
        tokenizer: as given by the user; ``None``: each has its own.

    Raises:
        UserError: one is damaged, or they do not share a vocabulary.
    """
    told = None if tokenizer is None else Path(tokenizer)
    found = {
        label: open_checkpoint(path, label, tokenizer=told)
        for label, path in subject.models.items()
    }
    if subject.experts:
        found = {label: only(one, subject.experts) for label, one in found.items()}
    sizes = {label: one.architecture.vocab_size for label, one in found.items()}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{label} {size}" for label, size in sizes.items())
        raise UserError(subject.name, f"vocabularies differ: {said}", "average models of one seed")
    return found


def precision_of(checkpoint: Checkpoint) -> Precision:
    """That in which the weights are stored; half precision, which Megatron's models here do not
    have, is computed in fp32."""
    dtypes = {tensor.dtype for tensor in checkpoint.tensors.values()}
    return "bf16" if torch.bfloat16 in dtypes else "fp32"


def similarity_index(subject: Subject, random_seed: int = 0) -> TfIdf | None:
    """tf-idf of the text that each model of a set was trained on; ``None`` where it is not used.

    Raises:
        UserError: the text is missing.
    """
    if subject.method not in ("top1", "top2"):
        return None
    if subject.run_dir is not None:
        recipe = load_recipe(subject.run_dir / "recipe.yaml")
        corpora = training_text(recipe, subject.run_dir)
        index = TfIdf({name: corpora[name] for name in subject.models}, random_seed=random_seed)
    else:
        index = TfIdf(
            {
                name: read_documents(find_files(subject.text[name], where=f"text of {name}"))
                for name in subject.models
            },
            random_seed=random_seed,
        )
    if index.empty:
        what = f"no training text of {', '.join(index.empty)} to compare contexts with (tf-idf)"
        fix = "give a set of models with their text, or with `method: posterior` (docs/evaluate.md)"
        raise UserError(subject.name, what, fix)
    return index
