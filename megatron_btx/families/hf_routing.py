"""What a router computes at inference, whatever it was trained with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_btx.errors import UserError
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Routing
from megatron_btx.weights.plan import Plan


@dataclass(frozen=True)
class HFRouting:
    """The k largest entries of a softmax over all experts, as they are or divided by their sum."""

    k: int
    normalised: bool

    def __str__(self) -> str:
        """As errors say it."""
        return f"top-{self.k} {'summing to one' if self.normalised else 'as they are'}"

    @classmethod
    def of(cls, architecture: Architecture) -> HFRouting:
        """The gates of an MoE.

        Switch's capacity is a rule for batches and no part of them: an exported model drops no
        token.

        Raises:
            UserError: its routing is none of that kind.
        """
        routing, experts = architecture.routing, len(architecture.experts)
        assert routing is not None
        if routing.type == "topk":
            k = routing.moe_router_topk
            return cls(k, not routing.moe_router_pre_softmax or k == experts)
        if routing.type == "soft":  # all chosen, and a softmax sums to one
            return cls(experts, True)
        if routing.type == "switch":
            return cls(1, False)
        if routing.greedy and not routing.first_layer_soft:  # the best one, with weight 1
            return cls(1, True)
        what = "sample_top1 draws its expert" if not routing.greedy else "sample_top1's first layer"
        why = "at random" if not routing.greedy else "routes softly, the others to one expert"
        raise UserError(
            "routing",
            f"no Hugging Face family computes this MoE: {what} {why}",
            "finetune with type topk, soft or switch, or with sample_top1, greedy: true and "
            "first_layer_soft: false",
        )

    def routing(self) -> Routing:
        """A recipe's routing with these gates."""
        if self.k == 1 and self.normalised:
            return Routing(type="sample_top1", greedy=True, first_layer_soft=False)
        return Routing(
            type="topk", moe_router_topk=self.k, moe_router_pre_softmax=not self.normalised
        )


def as_exported(plan: Plan) -> Plan:
    """A plan whose routing is that of the exported model: no capacity, no draws.

    Raises:
        UserError: its routing is none that a Hugging Face family has (:meth:`HFRouting.of`).
    """
    if plan.architecture.routing is None:
        return plan
    gates = HFRouting.of(plan.architecture).routing()
    return replace(plan, architecture=replace(plan.architecture, routing=gates))
