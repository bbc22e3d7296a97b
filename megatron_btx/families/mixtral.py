"""The mixtures of experts: the names and the keys that a dense model lacks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_btx.families.config import Always, ConfigReading, Field, Fixed, Unread
from megatron_btx.families.family import Family
from megatron_btx.families.hf_routing import HFRouting
from megatron_btx.families.llama import (
    ATTENTION,
    EMBEDDING,
    FIELDS,
    GROUPS,
    HEAD,
    HEAD_DIM,
    HEAD_NORMS,
    HF,
    LAYER,
    MULTIPLIERS,
    QKV_BIAS,
    WIDTH,
    HeadDim,
)
from megatron_btx.families.positions import LayerWindows, Rope, Window
from megatron_btx.families.table import Row, Table, expert_gate_up, shared_gate_up
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.count import expert_width
from megatron_btx.recipe.read_architecture import MOST_EXPERTS

# fmt: off
MOE_NORM: tuple[Row, ...] = (
    (LAYER + "pre_mlp_layernorm.weight", (HF + "post_attention_layernorm.weight",), None),
)


def experts(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Router and experts, tensor by tensor, under a family's own words."""
    mlp, each = HF + block + ".", HF + block + ".experts.{expert}."
    return (
        (LAYER + "mlp.router.weight", (mlp + "gate.weight",), None),
        (LAYER + "mlp.experts.{expert}.linear_fc1.weight",
            (each + gate + ".weight", each + up + ".weight"), expert_gate_up),
        (LAYER + "mlp.experts.{expert}.linear_fc2.weight", (each + down + ".weight",), None),
    )


def stacked_experts(router: str, gate_up: str, down: str) -> tuple[Row, ...]:
    """The same with all experts' tensors stacked, gate above up."""
    return (
        (LAYER + "mlp.router.weight", (HF + router,), None),
        (LAYER + "mlp.experts.{expert}.linear_fc1.weight", (HF + gate_up,), None),
        (LAYER + "mlp.experts.{expert}.linear_fc2.weight", (HF + down,), None),
    )


FUSED_EXPERTS = stacked_experts(
    "mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
)
"""As ``transformers`` 5 holds them in memory."""
_GRANITE = "block_sparse_moe."
GRANITE_EXPERTS = stacked_experts(
    _GRANITE + "router.layer.weight",
    _GRANITE + "input_linear.weight",
    _GRANITE + "output_linear.weight",
)
FUSED_GRANITE_EXPERTS = stacked_experts(
    _GRANITE + "router.weight", _GRANITE + "experts.gate_up_proj", _GRANITE + "experts.down_proj"
)
SHARED_EXPERT: tuple[Row, ...] = (
    (LAYER + "mlp.shared_experts.linear_fc1.weight",
        (HF + "mlp.shared_expert.gate_proj.weight",
         HF + "mlp.shared_expert.up_proj.weight"), shared_gate_up),
    (LAYER + "mlp.shared_experts.linear_fc2.weight",
        (HF + "mlp.shared_expert.down_proj.weight",), None),
    (LAYER + "mlp.shared_experts.gate_weight", (HF + "mlp.shared_expert_gate.weight",), None),
)
# fmt: on


@dataclass(frozen=True)
class ExpertWidth:
    """Inner width of an expert. Ours is only said where a dense layer's is another one."""

    key: str

    def read(self, reading: ConfigReading) -> None:
        """Also as the dense width, where the family has no key for that."""
        width = reading.need(self.key)
        if reading.model.setdefault("ffn_hidden_size", width) != width:
            reading.model["moe_ffn_hidden_size"] = width
        reading.keys["moe_ffn_hidden_size"] = self.key
        reading.keys.setdefault("ffn_hidden_size", self.key)

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """The experts' own."""
        return {self.key: expert_width(architecture.model)}


@dataclass(frozen=True)
class Experts:
    """How many experts there are and how a token chooses."""

    keys: tuple[str, ...]
    """Of their number: the one that is written, and another that some versions have."""
    normalised: bool | None = None
    """Whether gates sum to one; ``None``: ``norm_topk_prob`` says it."""

    def read(self, reading: ConfigReading) -> None:
        """Names of the experts (ours, where the mix gave them some) and their gates."""
        counts = {count for key in self.keys if (count := self._count(reading, key)) is not None}
        if len(counts) > 1:
            reading.refuse(f"{' and '.join(self.keys)} differ: {sorted(counts)}")
        elif not any(reading.take(key) is not None for key in self.keys):
            reading.need(self.keys[0])
        count = next(iter(counts), 0)
        numbers = tuple(map(str, range(count)))
        reading.experts = reading.typed(tuple[str, ...], "btx_experts", numbers)
        if counts and len(reading.experts) != count:
            reading.refuse(f"btx_experts names {len(reading.experts)} experts of {count}")
        normalised = self.normalised
        if normalised is None:
            normalised = reading.typed(bool, "norm_topk_prob", False)
        named = "btx_experts" if reading.take("btx_experts") is not None else self.keys[0]
        reading.keys |= {"experts": named, "moe_router_topk": "num_experts_per_tok"}
        if reading.need("num_experts_per_tok") is not None:
            k = reading.typed(int, "num_experts_per_tok", 1, low=1)
            reading.gates = HFRouting(k, normalised or k == count)

    def _count(self, reading: ConfigReading, key: str) -> int | None:
        count: int | None = reading.typed(int, key, None, low=1, high=MOST_EXPERTS)
        return count

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """Their number, names and gates."""
        gates = HFRouting.of(architecture)
        asks: dict[str, Any] = (
            {} if self.normalised is not None else {"norm_topk_prob": gates.normalised}
        )
        names = list(architecture.experts)
        if names != [str(at) for at in range(len(names))]:
            asks["btx_experts"] = names
        return {
            self.keys[0]: len(architecture.experts),
            "num_experts_per_tok": gates.k,
            **asks,
            "output_router_logits": False,
        }


_QWEN_EXPERTS = experts("mlp", "gate_proj", "up_proj", "down_proj")
_STATED_GROUPS = replace(GROUPS, nullable=False)
"""No version of ``transformers`` computes one of Qwen's mixtures where it is null."""
_EVERY_LAYER = (Fixed("decoder_sparse_step", 1), Fixed("mlp_only_layers", []))


def _table(attention: tuple[Row, ...], ffn: tuple[Row, ...]) -> Table:
    return Table((*EMBEDDING, *attention, *MOE_NORM, *ffn, *HEAD))


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    table=_table(ATTENTION, experts("block_sparse_moe", "w1", "w3", "w2")),
    fused=_table(ATTENTION, FUSED_EXPERTS),
    config=(
        *FIELDS,
        ExpertWidth("intermediate_size"),
        GROUPS,
        HEAD_DIM,
        Rope(1e6),
        Window(),
        Experts(("num_local_experts",), normalised=True),
        Unread("router_jitter_noise"),  # of training alone
    ),
)
QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    table=_table((*ATTENTION, *QKV_BIAS), (*_QWEN_EXPERTS, *SHARED_EXPERT)),
    fused=_table((*ATTENTION, *QKV_BIAS), (*FUSED_EXPERTS, *SHARED_EXPERT)),
    has_shared_expert=True,
    config=(
        *FIELDS,
        WIDTH,  # of layers without experts, of which there are none
        ExpertWidth("moe_intermediate_size"),
        Field(
            "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", required=True
        ),
        Always("moe_shared_expert_gate", True),
        Field("qkv_bias", "add_qkv_bias", default=True),
        _STATED_GROUPS,
        HEAD_DIM,
        Rope(1e4),
        LayerWindows(from_layer=False),
        Experts(("num_experts", "num_local_experts")),
        *_EVERY_LAYER,
    ),
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    table=_table((*ATTENTION, *HEAD_NORMS), _QWEN_EXPERTS),
    fused=_table((*ATTENTION, *HEAD_NORMS), FUSED_EXPERTS),
    config=(
        *FIELDS,
        WIDTH,
        ExpertWidth("moe_intermediate_size"),
        Always("qk_layernorm", True),
        Fixed("attention_bias", False),
        _STATED_GROUPS,
        HEAD_DIM,
        Rope(1e4),
        Window(absent=4096, switch=True),
        Experts(("num_experts", "num_local_experts")),
        *_EVERY_LAYER,
    ),
)
GRANITEMOE = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    table=_table(ATTENTION, GRANITE_EXPERTS),
    fused=_table(ATTENTION, FUSED_GRANITE_EXPERTS),
    config=(
        *FIELDS,
        ExpertWidth("intermediate_size"),
        Field("num_key_value_heads", "num_query_groups"),
        HeadDim(),
        Rope(1e4),
        Experts(("num_local_experts",), normalised=True),
        *MULTIPLIERS,
        Fixed("attention_bias", False),
    ),
)
