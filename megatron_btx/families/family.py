"""A family of models: how its Hugging Face directory maps to canonical names and our configuration.

Every field of ``config.json`` that changes what the model computes is either mapped or asserted: a
merge that loses one (the RoPE base above all: a default Mixtral has 1e6, a default Llama 1e4) still
runs, only worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.families.table import Table
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Model, Routing

# fmt: off
_FIELDS = {
    # config.json               Model
    "num_hidden_layers":        "num_layers",
    "hidden_size":              "hidden_size",
    "intermediate_size":        "ffn_hidden_size",
    "num_attention_heads":      "num_attention_heads",
    "num_key_value_heads":      "num_query_groups",
    "head_dim":                 "kv_channels",
    "max_position_embeddings":  "seq_length",
    "rope_theta":               "rotary_base",
    "rms_norm_eps":             "layernorm_epsilon",
    "initializer_range":        "init_method_std",
}
_REQUIRED = {
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps",
    "max_position_embeddings",
}
# fmt: on


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        model_type: of ``config.json``.
        architecture: its class in ``transformers``.
        table: its names.
        default_rope_theta: where ``config.json`` has none.
        fixed: fields of ``config.json`` that have one value, in the model that Megatron computes.
        is_moe: whether its feed-forward layers are experts.
    """

    model_type: str
    architecture: str
    table: Table
    default_rope_theta: float
    fixed: Mapping[str, Any]
    is_moe: bool

    def read_config(self, config: Mapping[str, Any], where: str) -> Architecture:
        """The architecture that a ``config.json`` describes.

        Raises:
            UserErrors: every field that is missing or has a value we would compute wrongly.
        """
        config = _with_rope(config)
        errors = [
            UserError(where, f"{key} is missing", "copy the model's own config.json")
            for key in sorted(_REQUIRED | {"vocab_size"})
            if config.get(key) is None
        ]
        for key, value in self.fixed.items():
            if config.get(key, value) != value:
                what = f"{key} is {config[key]!r}; only {value!r} is supported"
                errors.append(UserError(where, what, "this model cannot be used"))
        if self.is_moe and config.get("num_local_experts") is None:
            errors.append(UserError(where, "num_local_experts is missing"))
        if errors:
            raise UserErrors(errors)
        found = {ours: config[key] for key, ours in _FIELDS.items() if config.get(key) is not None}
        found.setdefault("rotary_base", self.default_rope_theta)
        model = Model(
            **found, untie_embeddings_and_output_weights=not config.get("tie_word_embeddings")
        )
        if not self.is_moe:
            return Architecture(model=model, vocab_size=config["vocab_size"])
        experts = config.get("btx_experts") or range(config["num_local_experts"])
        return Architecture(
            model=model,
            vocab_size=config["vocab_size"],
            experts=tuple(map(str, experts)),
            routing=Routing(type="topk", moe_router_topk=config.get("num_experts_per_tok", 2)),
        )

    def write_config(self, architecture: Architecture, dtype: str) -> dict[str, Any]:
        """The ``config.json`` of an architecture; the inverse of :meth:`read_config`.

        Raises:
            UserError: a routing that the family's code in ``transformers`` does not compute.
        """
        model = architecture.model
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": architecture.vocab_size,
            **{key: getattr(model, ours) for key, ours in _FIELDS.items()},
            **self.fixed,
            "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
            "torch_dtype": dtype,
            "use_cache": True,
        }
        heads = model.num_attention_heads
        config["num_key_value_heads"] = model.num_query_groups or heads
        config["head_dim"] = model.kv_channels or model.hidden_size // heads
        if self.is_moe:
            config["num_local_experts"] = len(architecture.experts)
            config["num_experts_per_tok"] = _experts_per_token(architecture)
            config["output_router_logits"] = False
            config["btx_experts"] = list(architecture.experts)
        return config


def _experts_per_token(architecture: Architecture) -> int:
    """k, where Mixtral's softmax over the chosen logits is what the model was trained with."""
    routing = architecture.routing
    assert routing is not None
    if routing.type == "topk":
        return routing.moe_router_topk
    if routing.type == "soft":  # all chosen: a softmax over all
        return len(architecture.experts)
    raise UserError(
        "export",
        f"Mixtral cannot express routing type {routing.type}: its gate of one expert is always 1",
        "finetune with routing type topk or soft, or set export.format: none",
    )


def _with_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings where transformers 4 had them: ``rope_theta`` and ``rope_scaling``."""
    config = dict(config)
    rope = config.pop("rope_parameters", None)
    if rope is None:
        return config
    rope = dict(rope)
    if rope.get("rope_theta") is not None:
        config["rope_theta"] = rope.pop("rope_theta")
    if rope.pop("rope_type", "default") != "default" or any(v is not None for v in rope.values()):
        config["rope_scaling"] = dict(rope) or "not default"
    return config
