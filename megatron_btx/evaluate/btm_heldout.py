"""Branch-Train-Merge on held-out text: the models one after the other, then their average."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megatron_btx.data.prepare import train_pairs
from megatron_btx.data.tokenizer import Tokenizer, load_tokenizer
from megatron_btx.engine.initializer import initialize
from megatron_btx.engine.model import DTYPES, build_model
from megatron_btx.errors import UserError
from megatron_btx.evaluate import btm
from megatron_btx.evaluate.btm import BtmMethod, Context
from megatron_btx.evaluate.heldout_loss import Batch, HeldOut, label_log_probs
from megatron_btx.evaluate.tfidf import DOCUMENTS, TfIdf
from megatron_btx.families.open_checkpoint import open_checkpoint
from megatron_btx.mix.one_model import copy
from megatron_btx.recipe import count
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Evaluate, Precision, Recipe
from megatron_btx.recipe.stages import model_stage, training


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the ensemble costs at inference. Choosing by tf-idf is not counted: it is no product of
    matrices."""

    models_per_token: int
    """Models that predict a token: k, or all of them for the posterior, whose weights are their
    predictions."""
    inference_flops_per_token: int
    params_active: int
    params_total: int


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Held-out losses of the models' average, and what it costs."""

    heldout: HeldOut
    """Its loss; ``load`` and ``gate`` are ``None``."""
    weights: dict[str, dict[str, float]]
    """By domain and model, the mean weight."""
    cost: Cost


def btm_heldout(
    models: Mapping[str, Path],
    domains: Mapping[str, Sequence[Batch]],
    *,
    method: BtmMethod,
    corpora: Mapping[str, Iterable[str]],
    tokenizer: Tokenizer,
    settings: Evaluate,
    precision: Precision,
    random_seed: int,
    context: Context = "prefix",
    prior: Mapping[str, float] | None = None,
) -> Ensemble:
    """Evaluate the models' average as ``evaluate`` does one model: the same sequences, the same
    mean over tokens and domains. Every rank of ``settings.layout`` calls it, after
    ``distributed.initialize``; one model is in memory at a time.

    Args:
        models: name -> final checkpoint; the seed last.
        domains: the held-out text.
        method: ``top1``, ``top2`` (by tf-idf) or ``posterior``.
        corpora: the training documents of every model (see :func:`training_text`); not looked at
            for ``posterior``.
        tokenizer: the models'.
        settings: layout and micro-batches.
        precision: of weights and activations.
        random_seed: of Megatron's generators and of the documents drawn.
        context: what the choice by tf-idf looks at.
        prior: of the posterior, by model; ``None``: uniform.

    Raises:
        UserError: the models differ in shape, or one has no training text.
    """
    architectures, scores = log_probs(models, domains, settings, precision, random_seed)
    index = None
    if method != "posterior":
        index = TfIdf({name: corpora.get(name, ()) for name in models}, random_seed=random_seed)
        if index.empty:
            raise UserError(
                "btm",
                f"{', '.join(index.empty)}: no training text to compare contexts with (tf-idf)",
                "use models trained in this run, or `method: posterior`, which needs no text",
            )
    known = None if prior is None else torch.tensor([prior[name] for name in models])
    loss: dict[str, float] = {}
    weights: dict[str, dict[str, float]] = {}
    for name, sequences in domains.items():
        if index is None:
            used = btm.posterior(scores[name], known)
        else:
            rows = [
                btm.chosen_weights(
                    index, sequences[row]["tokens"], tokenizer.decode,
                    k=btm.TOP[method], context=context,
                )
                for row in range(scores[name].shape[1])
            ]  # fmt: skip
            used = torch.stack(rows, dim=1)
        counts = torch.stack([sequences[row]["loss_mask"] for row in range(len(sequences))])
        each = btm.mixed(scores[name].double(), used) * counts
        loss[name] = -each.sum().item() / counts.sum().item()
        weights[name] = dict(btm.named(used[:, counts.bool()], list(models)))
    loss["mean"] = sum(loss.values()) / len(loss)
    return Ensemble(
        heldout=HeldOut(loss=loss, load=None, gate=None),
        weights=weights,
        cost=cost(architectures, method),
    )


def log_probs(
    models: Mapping[str, Path],
    domains: Mapping[str, Sequence[Batch]],
    settings: Evaluate,
    precision: Precision,
    random_seed: int,
) -> tuple[list[Architecture], dict[str, Tensor]]:
    """Each model's log-probability of every label.

    Returns:
        The models' architectures, and by domain fp32 [N, sequences, S].

    Raises:
        UserError: they do not share one vocabulary.
    """
    architectures: list[Architecture] = []
    scores: dict[str, list[Tensor]] = {name: [] for name in domains}
    for label, checkpoint in models.items():
        source = open_checkpoint(checkpoint, label)
        architectures.append(source.architecture)
        if source.architecture.vocab_size != architectures[0].vocab_size:
            raise UserError(
                str(checkpoint),
                f"has {source.architecture.vocab_size} tokens, the first model "
                f"{architectures[0].vocab_size}",
                "average models of one tokenizer",
            )
        model = build_model(
            source.architecture, settings.layout, precision, random_seed=random_seed
        )
        initialize(model, copy(source, dtype=DTYPES[precision]))
        for name, sequences in domains.items():
            scores[name].append(
                label_log_probs(model, name, sequences, micro_batch_size=settings.micro_batch_size)
            )
        del model
    return architectures, {name: torch.stack(rows) for name, rows in scores.items()}


def cost(architectures: Sequence[Architecture], method: str | None) -> Cost:
    """What a method costs with these models (``None``: one model). Which k of them run depends on
    the text, so the cost of k is that of the k most expensive."""
    ran = btm.TOP.get(method or "", len(architectures))
    flops = sorted((count.forward_flops_per_token(one) for one in architectures), reverse=True)
    parameters = [count.parameters(one) for one in architectures]
    active = sorted((one.active for one in parameters), reverse=True)
    return Cost(
        models_per_token=min(ran, len(architectures)),
        inference_flops_per_token=sum(flops[:ran]),
        params_active=sum(active[:ran]),
        params_total=sum(one.total for one in parameters),
    )


def training_text(
    recipe: Recipe, run_dir: Path, *, documents: int = DOCUMENTS
) -> dict[str, list[str]]:
    """Of every expert and of the seed, a sample of the documents that it was trained on: of each
    domain as many as its weight in the model's mixture, at even distances.

    They are read from the prepared token files, so that the text need not be there any more.
    """
    tokenizer = load_tokenizer(run_dir / "prepare" / "tokenizer")
    text: dict[str, list[str]] = {}
    for model in (*recipe.experts, "seed"):
        shares = count.mixture(training(recipe, model_stage(model)).data)
        text[model] = [
            document
            for domain, share in shares.items()
            for document in _documents(
                train_pairs(run_dir, domain), tokenizer, max(1, round(documents * share))
            )
        ]
    return text


def _documents(pairs: Sequence[Path], tokenizer: Tokenizer, most: int) -> Iterator[str]:
    datasets = [IndexedDataset(str(pair)) for pair in pairs]
    behind = np.cumsum([len(dataset) for dataset in datasets])
    many = min(most, int(behind[-1]))
    for place in range(many):
        document = place * int(behind[-1]) // many
        which = int(np.searchsorted(behind, document, "right"))
        inside = document - int(behind[which]) + len(datasets[which])
        ids: np.ndarray = datasets[which][inside]
        ends = len(ids) and ids[-1] == tokenizer.eos_id
        yield tokenizer.decode(ids[:-1] if ends else ids)
