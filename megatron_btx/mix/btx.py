"""Branch-Train-MiX itself (arXiv 2403.07816, section 3.2): N dense models become one MoE.

At every layer the models' feed-forward sublayers become the experts of one MoE sublayer, all other
parameters are averaged, and one linear router per layer is initialised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.mix.anchored import not_branches, own_expert, unused_rows, weighed
from megatron_btx.mix.average import UNIFORM, Averaging
from megatron_btx.mix.compatibility import disagreements, labels_of
from megatron_btx.mix.parts import moe_targets
from megatron_btx.mix.router_init import NORMAL, RouterInit
from megatron_btx.recipe.names import DENSE_NORM, MOE_NORM, canonical_tensors
from megatron_btx.recipe.schema import Mix, Routing
from megatron_btx.weights.arithmetic import Product
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.plan import Checkpoint, Ignore, Plan
from megatron_btx.weights.source import Source


def btx(
    models: Sequence[Checkpoint],
    *,
    routing: Routing,
    dtype: torch.dtype,
    router: RouterInit = NORMAL,
    averaging: Averaging = UNIFORM,
    fold_norms: bool = False,
    base: Checkpoint | None = None,
) -> Plan:
    """The plan of the MoE whose expert i is the FFN of model i.

    Args:
        models: dense models of one shape and tokenizer, in the order of the experts; or anchored
            branches of one (mix/anchored.py), each with its own expert.
        routing: how the MoE will route; kept with its architecture.
        dtype: of the result; averages are rounded to it once, from fp64.
        router: how the router of each layer is drawn.
        averaging: how all else is averaged.
        fold_norms: scale each expert's gate and up matrices by its own pre-FFN norm gain over the
            averaged one. RMSNorm's gain multiplies just before them, so each expert then sees the
            input it was trained on, to rounding.
        base: a model that is no expert, from which all else is copied instead.

    Raises:
        UserErrors: everything in which the models differ but must not; a gain of zero to fold by.
    """
    if router.kind == "branches" and (plain := not_branches(models, router.seed_model)):
        what = f"is branches, and {', '.join(plain)} {'is none' if len(plain) == 1 else 'are none'}"
        raise UserError("mix.router_init", what, "mix anchored branches, or choose another")
    branches = unused_rows(models, router)
    averaging = weighed(averaging, models, averaging.seed_model)
    models = [own_expert(model) for model in models]
    errors = disagreements([*models, base] if base else models) + averaging.errors(models)
    if errors:
        raise UserErrors(errors)
    architecture = models[0].architecture.mixture(labels_of(models), Mix(), routing)
    tensors = [model.tensors for model in models]

    def rest(name: str) -> Expression:
        if base is not None:
            return base.tensors[name].to(dtype)
        return averaging.of(name, models, dtype)

    def ffn(name: str, expert: int) -> Expression:
        own = tensors[expert][name]
        if not fold_norms or name.endswith("linear_fc2.weight"):
            return own.to(dtype)
        gain = name.replace("mlp.linear_fc1.weight", DENSE_NORM)
        return Product((own, tensors[expert][gain]), (rest(gain),), dtype)

    plan = Plan(
        architecture=architecture,
        targets=moe_targets(
            architecture,
            ffn=ffn,
            router=lambda name, shape: router.of_experts(name, shape, dtype, architecture.experts),
            rest=rest,
        ),
        sources=averaging.sources(models) | _of_base(base) | router.sources,
        expected=canonical_tensors(architecture),
        ignored=branches if base is None else _left_out(models, base, branches),
    )
    if fold_norms:
        _refuse_zero_gains(plan)
    return plan


def _of_base(base: Checkpoint | None) -> dict[str, Source]:
    return {} if base is None else {base.label: base.source}


def _left_out(
    models: Sequence[Checkpoint], base: Checkpoint, branches: Mapping[str, tuple[Ignore, ...]]
) -> dict[str, tuple[Ignore, ...]]:
    """The tensors of each source that the mix does not use: of a model all but its FFN, of the base
    its FFN."""
    ffn = r".*\.mlp\.linear_fc[12]\.weight"
    rest = Ignore(rf"(?!{ffn}$).*", f"copied from {base.label} instead")
    return {model.label: (*branches.get(model.label, ()), rest) for model in models} | {
        base.label: (Ignore(ffn, "it is no expert"),)
    }


def _refuse_zero_gains(plan: Plan) -> None:
    errors = []
    for name in plan.targets:
        if name.endswith(MOE_NORM) and not bool(plan.evaluate(name).all()):
            what = "an averaged gain is zero, so nothing can be divided by it"
            errors.append(UserError(name, what, "mix without fold_norms"))
    if errors:
        raise UserErrors(errors)
