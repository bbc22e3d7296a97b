"""An MoE whose every token goes to one expert: a dense model, as a plan."""

from __future__ import annotations

from dataclasses import replace

from megatron_btx.errors import UserError
from megatron_btx.recipe.count import expert_width
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.names import DENSE_NORM, MOE_NORM, SHARED, canonical_tensors
from megatron_btx.weights.plan import Ignore, Plan


def forced(moe: Plan, expert: int) -> Plan:
    """The dense model that ``moe`` computes while its routers choose ``expert`` alone.

    Raises:
        UserError: a shared expert runs beside it.
    """
    if any(SHARED in name for name in moe.targets):
        what = "has a shared expert, so no dense model computes what one of its experts does"
        raise UserError("the MoE", what, "use one without")
    width = expert_width(moe.architecture.model)
    model = replace(moe.architecture.model, ffn_hidden_size=width, moe_ffn_hidden_size=None)
    architecture = replace(moe.architecture, model=model, experts=(), routing=None)

    def of(name: str) -> Expression:
        own = name.replace(DENSE_NORM, MOE_NORM)
        return moe.targets[own.replace(".mlp.linear", f".mlp.experts.{expert}.linear")]

    expected = canonical_tensors(architecture)
    return Plan(
        architecture=architecture,
        targets={name: of(name) for name in expected},
        sources=moe.sources,
        expected=expected,
        ignored={
            label: (Ignore(r".*", "another expert's, or a router's"),) for label in moe.sources
        },
    )
