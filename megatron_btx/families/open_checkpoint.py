"""Checkpoints of either format, opened from a path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_btx.families.hf import open_hf
from megatron_btx.families.tokenizer_files import describe_tokenizer, place_of, vocabulary_size
from megatron_btx.weights.find_checkpoint import find_checkpoint, is_hugging_face
from megatron_btx.weights.manifest import MANIFEST
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.megatron_lm_args import check_padding, unsaid
from megatron_btx.weights.plan import Checkpoint


def open_checkpoint(
    path: str | Path,
    label: str,
    given: Mapping[str, Any] | None = None,
    tokenizer: Path | None = None,
    *,
    dense: bool = False,
) -> Checkpoint:
    """A checkpoint of either format.

    Args:
        path: as :func:`megatron_btx.weights.find_checkpoint.find_checkpoint` takes it.
        label: what the model is called among others.
        given: what a Megatron checkpoint does not say itself, in Megatron's words.
        tokenizer: the directory or file of the one that a checkpoint was trained with that does not
            say how large its vocabulary is; ``None``: the one that comes with it.
        dense: whether only a dense model will do, which what is said of a run's directory heeds.

    Raises:
        UserErrors: there is none, or it is damaged or one that we would compute wrongly.
    """
    checkpoint = find_checkpoint(path, label if dense else None)
    if is_hugging_face(checkpoint):
        return open_hf(checkpoint, label)
    if (checkpoint / MANIFEST).exists():
        return open_megatron(checkpoint, label)
    place = tokenizer or place_of(checkpoint)
    given = {**_vocabulary(checkpoint, place), **(given or {})}
    found = open_megatron(checkpoint, label, given)
    # Somebody else's: a tokenizer may lie beside the weights, or be named by the arguments.
    beside = {"tokenizer": describe_tokenizer(place_of(checkpoint))}
    return replace(found, manifest={**found.manifest, **beside})


def _vocabulary(checkpoint: Path, tokenizer: Path) -> dict[str, int]:
    """The size of a tokenizer, where Megatron-LM's arguments do not say it: it stores the padded
    one, and what tokenizer that was of."""
    if "vocab_size" not in unsaid(checkpoint):
        return {}
    size = vocabulary_size(tokenizer)
    if size is None:
        return {}
    check_padding(checkpoint, size)
    return {"vocab_size": size}
