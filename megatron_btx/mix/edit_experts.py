"""A finished MoE with one expert more, or one less."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.mix.compatibility import differences
from megatron_btx.mix.parts import moe_targets
from megatron_btx.mix.router_init import NORMAL, RouterInit
from megatron_btx.recipe.names import MOE_NORM, canonical_tensors
from megatron_btx.weights.arrange import Cat
from megatron_btx.weights.box import Shape
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.ops import rows
from megatron_btx.weights.plan import Checkpoint, Ignore, Plan


def append(
    moe: Checkpoint,
    model: Checkpoint,
    *,
    dtype: torch.dtype,
    router: RouterInit = NORMAL,
) -> Plan:
    """The plan of ``moe`` with the FFNs of ``model`` as its last expert.

    All else stays the MoE's own; each router gets one more row, drawn as the others once were.

    Raises:
        UserErrors: everything in which the two differ but must not.
    """
    errors = differences(moe, model)
    for one, is_moe, fix in ((moe, True, "give an MoE"), (model, False, "give a dense model")):
        if bool(one.architecture.experts) != is_moe:
            errors.append(UserError(one.label, "a dense model" if is_moe else "an MoE", fix))
    if model.label in moe.architecture.experts:
        what = f"the MoE has an expert {model.label} already"
        errors.append(UserError(model.label, what, "name the new one differently"))
    if errors:
        raise UserErrors(errors)
    old, new = moe.tensors, model.tensors
    count = len(moe.architecture.experts)
    architecture = replace(moe.architecture, experts=(*moe.architecture.experts, model.label))

    def longer(name: str, shape: Shape) -> Expression:
        row = router.draw(f"{name}/{model.label}", (1, shape[1]), dtype)
        return Cat((old[name].to(dtype), row), 0)

    return Plan(
        architecture=architecture,
        targets=moe_targets(
            architecture,
            ffn=lambda name, expert: (
                new[name] if expert == count else old[_expert(name, expert)]
            ).to(dtype),
            router=longer,
            rest=lambda name: old[_of_moe(name)].to(dtype),
        ),
        sources={moe.label: moe.source, model.label: model.source},
        expected=canonical_tensors(architecture),
        ignored={model.label: (Ignore(r"(?!.*\.mlp\.linear_fc[12]\.weight$).*", "not its FFN"),)},
    )


def drop(moe: Checkpoint, expert: str, *, dtype: torch.dtype) -> Plan:
    """The plan of ``moe`` without one expert and its rows of the routers.

    Raises:
        UserError: there is no such expert, or too few would be left to choose from.
    """
    experts = moe.architecture.experts
    if expert not in experts:
        known = ", ".join(experts) or "none: it is dense"
        raise UserError(moe.label, f"has no expert {expert}", f"its experts are {known}")
    routing = moe.architecture.routing
    assert routing is not None
    if len(experts) - 1 < (routing.moe_router_topk if routing.type == "topk" else 1):
        what = f"{len(experts) - 1} experts would be left, each token takes more"
        raise UserError(moe.label, what, "finetune with a smaller moe_router_topk first")
    gone = experts.index(expert)
    old = moe.tensors
    architecture = replace(moe.architecture, experts=experts[:gone] + experts[gone + 1 :])

    def shorter(name: str, _shape: Shape) -> Expression:
        whole = old[name].to(dtype)
        kept = [(0, gone), (gone + 1, len(experts))]
        return Cat(tuple(rows(whole, a, b) for a, b in kept if a < b), 0)

    return Plan(
        architecture=architecture,
        targets=moe_targets(
            architecture,
            ffn=lambda name, at: old[_expert(name, at + (at >= gone))].to(dtype),
            router=shorter,
            rest=lambda name: old[_of_moe(name)].to(dtype),
        ),
        sources={moe.label: moe.source},
        expected=canonical_tensors(architecture),
        ignored={moe.label: (Ignore(rf".*\.mlp\.experts\.{gone}\..*", f"expert {expert}"),)},
    )


def _expert(dense: str, expert: int) -> str:
    return dense.replace(".mlp.", f".mlp.experts.{expert}.")


def _of_moe(dense: str) -> str:
    return dense.replace("mlp.linear_fc1.layer_norm_weight", MOE_NORM)
