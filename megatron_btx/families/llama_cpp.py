"""What llama.cpp makes of a Hugging Face directory otherwise than ``transformers``.

Its converter and its graphs fix what ``config.json`` leaves open. Each rule here is one that
``tests/families/test_llama_cpp.py`` sees in the real ones, and that test sees no other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from megatron_btx.families.hf_routing import HFRouting
from megatron_btx.families.tokenizer_identity import FAST, SLOW
from megatron_btx.families.tokenizer_settings import CONFIG
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.count import windows

_NORMALISED = {"qwen2_moe": False, "qwen3_moe": True}
"""Whether gates are divided by their sum, whatever ``norm_topk_prob`` says."""
_ASKS_FOR_THE_SPACE = ("llama", "mistral", "mixtral")
"""Families whose converter reads ``add_prefix_space``. Of the others it takes it for true."""


def unlike(architecture: Architecture, model_type: str) -> list[str]:
    """Why llama.cpp does not compute what ``transformers`` computes; nothing where it does.

    Args:
        architecture: the model, before a family gives it a shared expert of zeros.
        model_type: the family that it was written as.
    """
    found = []
    model = architecture.model
    seen = min((width for width in windows(model) if width is not None), default=None)
    if seen is not None and seen < (model.max_position_embeddings or model.seq_length):
        found.append(f"it has no sliding window: right for texts of up to {seen} tokens only")
    if model_type == "qwen2_moe" and not model.untie_embeddings_and_output_weights:
        found.append("it loads no qwen2_moe whose embeddings are tied")
    if model_type == "qwen2_moe" and not model.moe_shared_expert_intermediate_size:
        found.append("it computes NaN where a shared expert's gate is zero, as here")
    fixed = _NORMALISED.get(model_type)
    gates = HFRouting.of(architecture) if architecture.experts else None
    if fixed is None or gates is None or gates.k == len(architecture.experts):
        return found
    if gates.normalised and not fixed:
        found.append(f"it does not make the gates of a {model_type} sum to one, as here they do")
    if fixed and not gates.normalised:
        found.append(f"it makes the gates of a {model_type} sum to one, which here they do not")
    return found


def without_misread(files: Mapping[str, bytes], model_type: str) -> dict[str, bytes]:
    """A tokenizer's files without a tokenizer.model before whose texts it would put a space that is
    none of theirs. ``tokenizer.json`` says the same; the converter then refuses, if anything."""
    kept = dict(files)
    if model_type in _ASKS_FOR_THE_SPACE or not {FAST, SLOW, CONFIG} <= kept.keys():
        return kept
    try:
        config = json.loads(kept[CONFIG])
    except ValueError:
        return kept  # what is damaged is told by who reads the tokenizer
    if isinstance(config, dict) and config.get("add_prefix_space") is False:
        del kept[SLOW]
    return kept
