"""Directories that hold something else than a model as ``save_pretrained`` writes it: named, with
what to do, instead of a missing tensor for each of hundreds."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.weights.model_files import ADAPTER

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
