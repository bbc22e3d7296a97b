"""What a checkpoint's weights are: the facts that decide names and shapes, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_btx.recipe.schema import Mix, Model, Recipe, Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A dense model, or the MoE that was mixed from such models. Written into every manifest."""

    model: Model
    vocab_size: int
    """The tokenizer's size; the stored matrices have ``padded_vocab_size`` rows."""
    experts: tuple[str, ...] = ()
    """Names of the experts in their order; empty for a dense model."""
    routing: Routing | None = None

    @property
    def num_moe_experts(self) -> int | None:
        """As Megatron's field: ``None`` for a dense model."""
        return len(self.experts) or None

    @property
    def padded_vocab_size(self) -> int:
        """``vocab_size`` rounded up; it never depends on a layout."""
        multiple = self.model.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple

    def to_json(self) -> dict[str, Any]:
        """The manifest's entries; ``read_architecture.from_manifest`` is the inverse."""
        moe = None
        if self.routing is not None:
            moe = {
                "num_moe_experts": len(self.experts),
                "experts": list(self.experts),
                "routing": asdict(self.routing),
            }
        return {
            "model": asdict(self.model),
            "vocab_size": self.vocab_size,
            "padded_vocab_size": self.padded_vocab_size,
            "moe": moe,
        }

    def mixed(self, recipe: Recipe) -> Architecture:
        """The MoE that a recipe makes of models of this (dense) architecture."""
        return self.mixture(recipe.model_names, recipe.mix, recipe.routing)

    def anchored(self, name: str, routing: Routing) -> Architecture:
        """The branch ``name`` of a model of this (dense) architecture: an MoE of its own expert and
        of the seed's. All its text is of one domain, so that there is nothing to balance."""
        alone = replace(
            routing,
            moe_router_topk=min(routing.moe_router_topk, 2),
            balance_loss_coeff=0.0,
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0,
        )
        return replace(self, experts=(name, "seed"), routing=alone)

    def mixture(self, models: Sequence[str], mix: Mix, routing: Routing) -> Architecture:
        """The MoE that ``mix`` makes of dense models of this architecture.

        Args:
            models: their names, in their order.
            mix: how they are mixed.
            routing: of the MoE.
        """
        width = self.model.ffn_hidden_size // mix.chunks
        return replace(
            self,
            model=replace(self.model, ffn_hidden_size=width),
            experts=mix.expert_names(models),
            routing=routing,
        )
