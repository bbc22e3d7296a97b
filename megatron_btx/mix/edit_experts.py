"""A finished MoE with one expert more, one less, or another in its place; and some of its experts
only. All other experts stay as they are, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.mix.anchored import own_expert
from megatron_btx.mix.compatibility import differences
from megatron_btx.mix.parts import moe_targets
from megatron_btx.mix.router_init import NORMAL, RouterInit
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.names import MOE_NORM, canonical_tensors
from megatron_btx.weights.arrange import Cat
from megatron_btx.weights.box import Shape
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.ops import rows
from megatron_btx.weights.plan import Checkpoint, Ignore, Plan
from megatron_btx.weights.source import View

Cast = Callable[[Expression], Expression]


def append(
    moe: Checkpoint,
    model: Checkpoint,
    *,
    dtype: torch.dtype,
    router: RouterInit = NORMAL,
) -> Plan:
    """The plan of ``moe`` with the FFNs of ``model`` as its last expert.

    All else stays the MoE's own; each router gets one more row, drawn as the others were.

    Args:
        moe: the mixed model.
        model: dense, or an anchored branch, whose own expert is taken.
        dtype: of the result.
        router: how the new rows are drawn.

    Raises:
        UserErrors: everything in which the two differ but must not.
    """
    model = own_expert(model)
    experts = moe.architecture.experts
    _check_new(moe, model, experts)
    old, new = moe.tensors, model.tensors
    architecture = replace(moe.architecture, experts=(*experts, model.label))

    def longer(name: str, shape: Shape) -> Expression:
        row = router.draw(f"{name}/{model.label}", (1, shape[1]), dtype)
        return Cat((old[name].to(dtype), row), 0)

    def ffn(name: str, expert: int) -> Expression:
        return new[name] if expert == len(experts) else old[_expert(name, expert)]

    return Plan(
        architecture=architecture,
        targets=_targets(moe, architecture, ffn, longer, lambda one: one.to(dtype)),
        sources={moe.label: moe.source, model.label: model.source},
        expected=canonical_tensors(architecture),
        ignored={model.label: _NOT_ITS_FFN},
    )


def replace_expert(moe: Checkpoint, model: Checkpoint, expert: str, *, dtype: torch.dtype) -> Plan:
    """The plan of ``moe`` with the FFNs of ``model`` in the place of one expert, under the name of
    ``model``. The routers stay as they are: the new expert is for what the old one was for.

    Args:
        moe: the mixed model.
        model: dense, or an anchored branch, whose own expert is taken.
        expert: whose place it takes.
        dtype: of the result.

    Raises:
        UserErrors: everything in which the two differ but must not; there is no such expert.
    """
    model = own_expert(model)
    experts = moe.architecture.experts
    gone = _index(moe, expert)
    _check_new(moe, model, experts[:gone] + experts[gone + 1 :])
    old, new = moe.tensors, model.tensors
    architecture = replace(
        moe.architecture, experts=(*experts[:gone], model.label, *experts[gone + 1 :])
    )

    def ffn(name: str, at: int) -> Expression:
        return new[name] if at == gone else old[_expert(name, at)]

    return Plan(
        architecture=architecture,
        targets=_targets(
            moe, architecture, ffn, lambda name, _: old[name].to(dtype), lambda one: one.to(dtype)
        ),
        sources={moe.label: moe.source, model.label: model.source},
        expected=canonical_tensors(architecture),
        ignored={model.label: _NOT_ITS_FFN, moe.label: _others({gone}, experts)},
    )


def drop(moe: Checkpoint, expert: str, *, dtype: torch.dtype) -> Plan:
    """The plan of ``moe`` without one expert and its rows of the routers.

    Raises:
        UserError: there is no such expert, or fewer would remain than the router chooses.
    """
    gone = _index(moe, expert)
    experts = moe.architecture.experts
    return _kept(moe, experts[:gone] + experts[gone + 1 :], lambda one: one.to(dtype))


def only(moe: Checkpoint, experts: Sequence[str]) -> Checkpoint:
    """An MoE seen as one that has some of its experts only, in its own order.

    Raises:
        UserError: there is no such expert, or fewer would remain than the router chooses.
    """
    chosen = {_index(moe, expert) for expert in experts}
    names = moe.architecture.experts
    plan = _kept(moe, [names[place] for place in sorted(chosen)], lambda one: one)
    view = View(moe.source, plan.targets)
    return replace(moe, architecture=plan.architecture, source=view)


def _kept(moe: Checkpoint, experts: Sequence[str], cast: Cast) -> Plan:
    names, routing = moe.architecture.experts, moe.architecture.routing
    assert routing is not None
    if len(experts) < (routing.moe_router_topk if routing.type == "topk" else 1):
        what = f"{len(experts)} experts would be left, each token takes more"
        raise UserError(moe.label, what, "finetune with a smaller moe_router_topk first")
    kept = [names.index(expert) for expert in experts]
    old = moe.tensors
    architecture = replace(moe.architecture, experts=tuple(experts))

    def shorter(name: str, _shape: Shape) -> Expression:
        return Cat(tuple(rows(cast(old[name]), *span) for span in _spans(kept)), 0)

    return Plan(
        architecture=architecture,
        targets=_targets(
            moe, architecture, lambda name, at: old[_expert(name, kept[at])], shorter, cast
        ),
        sources={moe.label: moe.source},
        expected=canonical_tensors(architecture),
        ignored={moe.label: _others({*range(len(names))} - {*kept}, names)},
    )


def _targets(
    moe: Checkpoint,
    architecture: Architecture,
    ffn: Callable[[str, int], Expression],
    router: Callable[[str, Shape], Expression],
    cast: Cast,
) -> dict[str, Expression]:
    """Experts and routers by their rules, all else the MoE's own."""
    return moe_targets(
        architecture,
        ffn=lambda name, expert: cast(ffn(name, expert)),
        router=router,
        rest=lambda name: cast(moe.tensors[_of_moe(name)]),
    )


def _spans(places: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending places as ranges that are as long as can be."""
    spans: list[tuple[int, int]] = []
    for place in places:
        if spans and spans[-1][1] == place:
            spans[-1] = (spans[-1][0], place + 1)
        else:
            spans.append((place, place + 1))
    return spans


def _index(moe: Checkpoint, expert: str) -> int:
    experts = moe.architecture.experts
    if expert not in experts:
        known = ", ".join(experts) or "none: it is dense"
        raise UserError(moe.label, f"has no expert {expert}", f"its experts are {known}")
    return experts.index(expert)


def _check_new(moe: Checkpoint, model: Checkpoint, others: Sequence[str]) -> None:
    """That a model can be an expert beside ``others``.

    Raises:
        UserErrors: why not.
    """
    errors = differences(moe, model)
    for one, is_moe, fix in ((moe, True, "give an MoE"), (model, False, "give a dense model")):
        if bool(one.architecture.experts) != is_moe:
            errors.append(UserError(one.label, "a dense model" if is_moe else "an MoE", fix))
    if model.label in others:
        what = f"the MoE has an expert {model.label} already"
        errors.append(UserError(model.label, what, "name the new one differently"))
    if errors:
        raise UserErrors(errors)


_NOT_ITS_FFN = (Ignore(r"(?!.*\.mlp\.linear_fc[12]\.weight$).*", "not its FFN"),)


def _others(gone: set[int], names: Sequence[str]) -> tuple[Ignore, ...]:
    """Of experts that are left out."""
    return tuple(
        Ignore(rf".*\.mlp\.experts\.{place}\..*", f"expert {names[place]}")
        for place in sorted(gone)
    )


def _expert(dense: str, expert: int) -> str:
    return dense.replace(".mlp.", f".mlp.experts.{expert}.")


def _of_moe(dense: str) -> str:
    return dense.replace("mlp.linear_fc1.layer_norm_weight", MOE_NORM)
