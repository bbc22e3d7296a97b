"""Nats per token and bits per byte of any checkpoint, or of a set of them, on any JSONL."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_btx.data.documents import find_files
from megatron_btx.data.heldout_sequences import Sample
from megatron_btx.data.tokenizer import given_tokenizer, tokenizer_of
from megatron_btx.errors import UserError
from megatron_btx.evaluate import btm
from megatron_btx.evaluate.btm_heldout import cost
from megatron_btx.evaluate.heldout_loss import label_log_probs, not_finite
from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.evaluate.models import (
    load,
    opened,
    similarity_index,
)
from megatron_btx.evaluate.packed_text import PackedText, read
from megatron_btx.evaluate.predictor import NO_PROGRESS
from megatron_btx.evaluate.routing_stats import expert_choices
from megatron_btx.recipe.schema import Layout, Precision
from megatron_btx.weights.plan import Checkpoint


@dataclass(frozen=True, kw_only=True)
class EvalSetting:
    """How a subject is run."""

    layout: Layout = Layout()
    precision: Precision | None = None
    """``None``: as the weights are stored."""
    micro_batch_size: int = 8
    """Sequences a rank runs at once."""
    seq_length: int | None = None
    """Tokens of a sequence; ``None``: the model's own."""
    tokenizer: str | None = None
    """A directory or file; ``None``: the checkpoint's own."""
    tokens: int | None = None
    """Of each text, at most about; ``None``: all."""
    text_key: str = "text"
    random_seed: int = 0


def evaluate_data(
    subject: Subject,
    data: Mapping[str, Sequence[str]],
    setting: EvalSetting,
    progress: Callable[[float], None] = NO_PROGRESS,
) -> dict[str, Any]:
    """Every token of every text, predicted once. Every rank calls it.

    Bits per byte are all bits, of the tokens that end documents too, over the bytes of the
    documents: they compare models of different tokenizers.

    Args:
        subject: the model or set.
        data: by name, JSONL files and directories.
        setting: how.
        progress: told how much is done.

    Returns:
        ``{"data": {name: {"nats_per_token", "bits_per_byte", "documents", "tokens", "bytes"}},
        "mean": of nats per token over the texts, "seq_length", "inference_flops_per_token",
        "params_active", "params_total"}``, of a set the mean ``weights`` of its models by text, and
        of Sample Top-1 the ``expert_choice``.

    Raises:
        UserError: the model computes NaN or infinity; every rank raises it.
    """
    checkpoints = opened(subject, setting.tokenizer)
    tp = setting.layout.tensor_model_parallel_size
    texts = packed(subject, data, setting, checkpoints)
    length = next(iter(texts.values())).seq_length
    texts = {name: text.fitted(tp) for name, text in texts.items()}
    scores: dict[str, list[Tensor]] = {name: [] for name in texts}
    done, work = 0, len(checkpoints) * len(texts)
    for checkpoint in checkpoints.values():
        live = load(checkpoint, setting.layout, setting.precision, setting.random_seed)
        for name, text in texts.items():
            size = setting.micro_batch_size
            scores[name].append(label_log_probs(live.module, name, text, micro_batch_size=size))
            done += 1
            progress(done / work)
        del live
    index = similarity_index(subject, setting.random_seed)
    result: dict[str, Any] = {"data": {}}
    for name, text in texts.items():
        stacked, counts = (
            torch.stack(scores[name]),
            torch.stack([s["loss_mask"] for s in _all(text)]),
        )
        if subject.method is None:
            log_probs = stacked[0].double()
        else:
            weights = _weights(subject, stacked, text, index)
            log_probs = btm.mixed(stacked.double(), weights)
            used = weights[:, counts.bool()]
            result.setdefault("weights", {})[name] = dict(btm.named(used, list(checkpoints)))
        nats = -(log_probs * counts).sum().item()
        if not math.isfinite(nats):
            raise not_finite(subject.name, f" on the text of {name}")
        result["data"][name] = {
            "nats_per_token": nats / text.size.tokens,
            "bits_per_byte": nats / math.log(2) / max(text.size.bytes, 1),
            **asdict(text.size),
        }
    losses = [entry["nats_per_token"] for entry in result["data"].values()]
    result["mean"] = sum(losses) / len(losses)
    result["seq_length"] = length
    choice = expert_choices(one.architecture.routing for one in checkpoints.values())
    if choice is not None:
        result["expert_choice"] = choice
    spent = cost([one.architecture for one in checkpoints.values()], subject.method)
    return result | asdict(spent)


def min_length(checkpoints: Mapping[str, Checkpoint], setting: EvalSetting) -> int:
    """The length of the sequences.

    Raises:
        UserError: the models cannot take what is asked for.
    """
    most = min(one.architecture.model.seq_length for one in checkpoints.values())
    wanted = most if setting.seq_length is None else setting.seq_length
    if not 1 <= wanted <= most:
        raise UserError("--seq-length", f"{wanted} is not from 1 to the model's {most}")
    tp = setting.layout.tensor_model_parallel_size
    if wanted % tp:
        raise UserError("--seq-length", f"{wanted} is not a multiple of tensor parallelism ({tp})")
    return wanted


def packed(
    subject: Subject,
    data: Mapping[str, Sequence[str]],
    setting: EvalSetting,
    checkpoints: Mapping[str, Checkpoint],
) -> dict[str, PackedText]:
    """Each text in the tokens of a subject, of which ``checkpoints`` are the opened ones.

    Raises:
        UserError: a file is missing, damaged or empty, there is no tokenizer, or one with tokens
            that the models have not.
    """
    seq_length = min_length(checkpoints, setting)
    if setting.tokenizer is None:
        tokenizer = tokenizer_of(subject.first)
    else:
        tokenizer = given_tokenizer(Path(setting.tokenizer))
    return {
        name: PackedText(
            read(find_files(files, where=f"--data {name}"), setting.text_key, tokenizer),
            tokenizer,
            seq_length,
            start_id=tokenizer.start_id,
            vocab_size=next(iter(checkpoints.values())).architecture.vocab_size,
            most=setting.tokens,
            where=f"--data {name}",
        )
        for name, files in data.items()
    }


def whole_sequences(name: str, text: PackedText) -> list[Sample]:
    """The sequences of a text without the last one, where that is not full.

    Raises:
        UserError: there is none.
    """
    found = [text[place] for place in range(text.size.tokens // text.seq_length)]
    if not found:
        what = f"holds less than one sequence of {text.seq_length} tokens"
        raise UserError(f"--data {name}", what, "give more text, or a smaller --seq-length")
    return found


def _weights(subject: Subject, scores: Tensor, text: PackedText, index: Any) -> Tensor:
    """Of a set's models [N, sequences, S]."""
    if index is None:
        prior = None
        if subject.prior is not None:
            prior = torch.tensor([float(subject.prior[name]) for name in subject.models])
            prior = prior / prior.sum()
        return btm.posterior(scores, prior)
    return torch.stack(
        [
            btm.chosen_weights(
                index,
                one["tokens"],
                text.tokenizer.decode,
                k=btm.TOP[str(subject.method)],
                context="document" if subject.context == "document" else "prefix",
            )
            for one in _all(text)
        ],
        dim=1,
    )


def _all(text: PackedText) -> list[dict[str, Tensor]]:
    return [text[place] for place in range(len(text))]
