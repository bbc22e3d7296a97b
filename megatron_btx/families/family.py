"""A family of models: how its Hugging Face directory maps to canonical names and our configuration.

Every field of ``config.json`` that changes what the model computes is either mapped or asserted: a
merge that loses one (the RoPE base above all: a default Mixtral has 1e6, a default Llama 1e4) still
runs, only worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_btx.errors import UserError, UserErrors, collect_errors
from megatron_btx.families.config import ConfigPart, ConfigReading
from megatron_btx.families.hf_routing import HFRouting
from megatron_btx.families.table import Table
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.count import expert_width, resolved, windows
from megatron_btx.recipe.read_architecture import read_architecture
from megatron_btx.recipe.yaml_tree import Node

ZERO_WIDTH = 64
"""Inner units of a shared expert of zeros."""


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        model_type: of ``config.json``.
        architecture: its class in ``transformers``.
        table: its names, as most directories and every loader have them.
        config: its ``config.json``, part by part.
        fused: the names with all experts' tensors stacked, for an MoE.
        has_shared_expert: whether every MoE layer has one. A model without is given one of zeros.
    """

    model_type: str
    architecture: str
    table: Table
    config: tuple[ConfigPart, ...]
    fused: Table | None = None
    has_shared_expert: bool = False

    def read_config(self, config: Mapping[str, Any], where: str) -> Architecture:
        """The architecture that a ``config.json`` describes.

        Raises:
            UserErrors: every field that is missing, unknown, or has a value we would compute
                wrongly.
        """
        reading = ConfigReading(config, where)
        reading.need("vocab_size")
        for part in self.config:
            part.read(reading)
        reading.tokens()
        reading.unknown()
        described, found = None, list[UserError]()
        with collect_errors(found):
            described = read_architecture(_entries(reading))
        known = bool(reading.errors)  # what they are about is not there for the model, of course
        errors = reading.errors + [e for e in found if not known or e.what != "is missing"]
        if described is None or errors:
            raise UserErrors(list({str(error): error for error in errors}.values()))
        return described

    def write_config(self, architecture: Architecture) -> dict[str, Any]:
        """The ``config.json`` of an architecture; :meth:`lacks` says whether it means the same."""
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": architecture.vocab_size,
        }
        for part in self.config:
            config |= part.write(self.stored(architecture))
        return config | {"use_cache": True}

    def stored(self, architecture: Architecture) -> Architecture:
        """What the family stores for an architecture: itself, or with a shared expert of zeros."""
        if not self.has_shared_expert or architecture.model.moe_shared_expert_intermediate_size:
            return architecture
        model = replace(
            architecture.model,
            moe_shared_expert_intermediate_size=ZERO_WIDTH,
            moe_shared_expert_gate=True,
        )
        return replace(architecture, model=model)

    def lacks(self, architecture: Architecture) -> list[str]:
        """Why the family does not compute this architecture; nothing where it does."""
        if bool(architecture.experts) != (self.fused is not None):
            return ["it is for dense models" if architecture.experts else "it is for mixtures"]
        wanted = computed(self.stored(architecture))
        try:
            got = computed(self.read_config(self.write_config(architecture), self.model_type))
        except UserErrors as errors:
            return [error.what for error in errors.errors]
        return [
            f"{name} would be {got[name]}, not {wanted[name]}"
            for name in wanted
            if got[name] != wanted[name]
        ]


def _entries(reading: ConfigReading) -> Node:
    """What was read, each value with its key in ``config.json``."""
    whole = reading.node("", reading.config)

    def block(values: Mapping[str, Any]) -> Node:
        nodes = {ours: reading.node(reading.keys.get(ours, ours), values[ours]) for ours in values}
        return replace(whole, value=nodes)

    moe = replace(whole, value=None)
    if reading.gates is not None:
        routing = block(asdict(reading.gates.routing()))
        experts = reading.node(reading.keys["experts"], list(reading.experts))
        moe = replace(whole, value={"experts": experts, "routing": routing})
    entries = {"model": block(reading.model), "moe": moe}
    if (vocabulary := whole.value.get("vocab_size")) is not None:
        entries["vocab_size"] = vocabulary
    return replace(whole, value=entries)


def computed(architecture: Architecture) -> dict[str, Any]:
    """Everything that a function of tokens depends on beside the weights, in one form."""
    model = resolved(architecture.model)
    facts = asdict(model) | {
        "max_position_embeddings": model.max_position_embeddings or model.seq_length,
        "window_size": windows(model),
        "rope_scaling_factor": model.rope_scaling and model.rope_scaling_factor,
        "vocab_size": architecture.vocab_size,
    }
    for name in ("seq_length", "make_vocab_size_divisible_by", "window_attn_skip_freq"):
        del facts[name]
    if architecture.experts:
        del facts["ffn_hidden_size"]
        facts["moe_ffn_hidden_size"] = expert_width(model)
        facts |= {"experts": architecture.experts, "gates": HFRouting.of(architecture)}
    return facts
