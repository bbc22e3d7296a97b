"""What llama.cpp makes of a Hugging Face directory otherwise than ``transformers``.

Its converter and its graphs fix what ``config.json`` leaves open. Each rule here is one that
``tests/families/test_llama_cpp.py`` sees in the real ones, and that test sees no other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_btx.families.hf import read_config
from megatron_btx.families.hf_routing import HFRouting
from megatron_btx.families.tokenizer_files import tokenizer_files
from megatron_btx.families.tokenizer_identity import FAST, SLOW
from megatron_btx.families.tokenizer_settings import CONFIG
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.count import windows

_NORMALISED = {"qwen2_moe": False, "qwen3_moe": True}
"""Whether gates are divided by their sum, whatever ``norm_topk_prob`` says."""
_ASKS_FOR_THE_SPACE = ("llama", "mistral", "mixtral", "granite", "granitemoe", "smollm3")
"""Families whose converter reads ``add_prefix_space``. Of the others it takes it for true."""

_SMOLLM3 = 4
"""Which layers of a SmolLM3 have no rotary positions: this one and its multiples."""


def unlike(
    architecture: Architecture, model_type: str, tokenizer: Mapping[str, bytes]
) -> list[str]:
    """Why llama.cpp does not compute what ``transformers`` computes; nothing where it does.

    Args:
        architecture: the model.
        model_type: the family that it was written as.
        tokenizer: its files by name, as :func:`tokenizer_files` gives them; none where the model
            has no tokenizer.
    """
    found = []
    model = architecture.model
    if model_type not in _ASKS_FOR_THE_SPACE and _is_sentencepiece_without_space(tokenizer):
        found.append(f"its converter refuses a {model_type} with this SentencePiece tokenizer")
    elif model_type == "phi3" and FAST in tokenizer and not _reads_phi3(tokenizer):
        found.append("its converter refuses a phi3 without tokenizer.model")
    seen = min((width for width in windows(model) if width is not None), default=None)
    if seen is not None and seen < (model.max_position_embeddings or model.seq_length):
        found.append(f"it has no sliding window: right for texts of up to {seen} tokens only")
    skipped = model.no_rope_freq or (0,) * model.num_layers
    if model_type == "smollm3" and any(
        bool(skip) != (layer % _SMOLLM3 == 0) for layer, skip in enumerate(skipped, 1)
    ):
        found.append(f"it takes rotary positions from each {_SMOLLM3}th layer of a smollm3 alone")
    if model_type == "qwen2_moe" and not model.untie_embeddings_and_output_weights:
        found.append("it loads no qwen2_moe whose embeddings are tied")
    fixed = _NORMALISED.get(model_type)
    gates = HFRouting.of(architecture) if architecture.experts else None
    if fixed is None or gates is None or gates.k == len(architecture.experts):
        return found
    if gates.normalised and not fixed:
        found.append(f"it does not make the gates of a {model_type} sum to one, as here they do")
    if fixed and not gates.normalised:
        found.append(f"it makes the gates of a {model_type} sum to one, which here they do not")
    return found


def unlike_written(architecture: Architecture, exported: Path) -> list[str]:
    """:func:`unlike`, of the Hugging Face directory that a model was exported to.

    Raises:
        UserError: the directory's ``config.json`` or tokenizer cannot be read.
    """
    family, _, _ = read_config(exported)
    tokenizer = tokenizer_files(exported, megatron=False)
    return unlike(architecture, family.model_type, tokenizer)


def without_misread(files: Mapping[str, bytes], model_type: str) -> dict[str, bytes]:
    """A tokenizer's files without a tokenizer.model before whose texts it would put a space that is
    none of theirs. ``tokenizer.json`` says the same; the converter then refuses, if anything."""
    kept = dict(files)
    if model_type not in _ASKS_FOR_THE_SPACE and {FAST, SLOW} <= kept.keys() and _no_space(kept):
        del kept[SLOW]
    return kept


def _no_space(files: Mapping[str, bytes]) -> bool:
    return _entry(files, CONFIG, "add_prefix_space") is False


def _is_sentencepiece_without_space(files: Mapping[str, bytes]) -> bool:
    """By its ``tokenizer.json``: BPE that falls back to bytes is SentencePiece's."""
    model = _entry(files, FAST, "model") if _no_space(files) else None
    return isinstance(model, dict) and model.get("byte_fallback") is True


def _reads_phi3(files: Mapping[str, bytes]) -> bool:
    return SLOW in files or _entry(files, CONFIG, "tokenizer_class") == "GPT2Tokenizer"


def _entry(files: Mapping[str, bytes], name: str, key: str) -> Any:
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError:
        return None  # what is damaged is told by who reads the tokenizer
    return content.get(key) if isinstance(content, dict) else None
