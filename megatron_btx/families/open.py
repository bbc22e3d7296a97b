"""Checkpoints of either format, opened from a path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_btx.families.hf import open_hf
from megatron_btx.families.tokenizer_files import describe_tokenizer, place_of
from megatron_btx.weights.find_checkpoint import find_checkpoint, is_hugging_face
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.plan import Checkpoint


def open_checkpoint(
    path: str | Path, label: str, given: Mapping[str, Any] | None = None
) -> Checkpoint:
    """A checkpoint of either format.

    Args:
        path: as :func:`megatron_btx.weights.find_checkpoint.find_checkpoint` takes it.
        label: what the model is called among others.
        given: what a Megatron checkpoint does not say itself, in Megatron's words.

    Raises:
        UserErrors: there is none, or it is damaged or one that we would compute wrongly.
    """
    checkpoint = find_checkpoint(path)
    if is_hugging_face(checkpoint):
        return open_hf(checkpoint, label)
    found = open_megatron(checkpoint, label, given)
    if "tokenizer" in found.manifest:
        return found
    # Not ours: Megatron-Bridge leaves a tokenizer beside the weights, and says nothing of it.
    beside = {"tokenizer": describe_tokenizer(place_of(checkpoint))}
    return replace(found, manifest={**found.manifest, **beside})
