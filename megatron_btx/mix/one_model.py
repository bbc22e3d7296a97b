"""Plans of one model: as it is (:func:`copy`), newly initialised (:func:`fresh`), or the dense
model that one expert of an MoE is (:func:`forced`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_btx.errors import UserError
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.count import expert_width
from megatron_btx.recipe.names import DENSE_NORM, MOE_NORM, SHARED, canonical_tensors
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.plan import Checkpoint, Ignore, Plan
from megatron_btx.weights.random_fill import Draw, Fill

_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


def copy(model: Checkpoint, *, dtype: torch.dtype, givers: Sequence[Checkpoint] = ()) -> Plan:
    """Every tensor of ``model``, rounded to ``dtype`` where it has another: a model as it is,
    under any layout and in any precision.

    Args:
        model: the one; some of its rows may be those of others (align_vocab.py).
        dtype: of the result.
        givers: these others.
    """
    return Plan(
        architecture=model.architecture,
        targets={name: take.to(dtype) for name, take in model.tensors.items()},
        sources={one.label: one.source for one in (model, *givers)},
        expected=canonical_tensors(model.architecture),
        ignored={one.label: (Ignore(r".*", "gives what another lacks"),) for one in givers},
    )


def fresh(architecture: Architecture, *, seed: int, dtype: torch.dtype) -> Plan:
    """The plan of a newly initialised dense model: every weight a named draw. The numbers depend on
    the seed and the tensor's name alone, so it begins with the same bits under every layout.

    Megatron's own rule: normal with ``init_method_std``; matrices that write into the residual
    stream divided by ``sqrt(2 L)`` (its ``scaled_init_method_normal``); norms one, biases zero.
    """
    model = architecture.model
    expected = canonical_tensors(architecture)
    targets: dict[str, Expression] = {}
    for name, shape in expected.items():
        std = model.init_method_std
        if name.endswith(_RESIDUAL):
            std /= math.sqrt(2 * model.num_layers)
        if "norm" in name:
            targets[name] = Fill(1.0, shape, dtype)
        elif name.endswith("bias"):
            targets[name] = Fill(0.0, shape, dtype)
        else:
            targets[name] = Draw("normal", std, seed, name, shape, dtype)
    return Plan(architecture=architecture, targets=targets, sources={}, expected=expected)


def forced(moe: Plan, expert: int) -> Plan:
    """The dense model that ``moe`` computes while its routers choose ``expert`` alone.

    Raises:
        UserError: a shared expert runs beside it.
    """
    if any(SHARED in name for name in moe.targets):
        what = "has a shared expert, so one of its experts alone is no dense model"
        raise UserError("the MoE", what, "use an MoE without a shared expert")
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
